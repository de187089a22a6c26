// The portable reference: plain loops, the definition of what every other kernel must return.
#include <cmath>

#include "micro.h"

namespace squat::kernels {
namespace {

// The code in the low (half 0) or high (half 1) nibble, two's complement.
int nibble(uint8_t byte, int half) {
  const int code = half ? byte >> 4 : byte & 15;
  return code < 8 ? code : code - 16;
}

struct A8W8 {
  static constexpr int kM = 1, kN = 1, kZero = 0;
  template <int M>
  static void tile(const MatmulCall& call, const uint8_t* a, const uint8_t* w, int32_t* acc) {
    int32_t sum = 0;
    for (int k = 0; k < call.group_count; ++k) {
      sum += static_cast<int8_t>(a[k]) * static_cast<int8_t>(w[k]);
    }
    *acc = sum;
  }
};

struct A8W4 {
  static constexpr int kM = 1, kN = 1, kZero = 0;
  template <int M>
  static void tile(const MatmulCall& call, const uint8_t* a, const uint8_t* w, int32_t* acc) {
    int32_t sum = 0;
    for (int pair = 0; pair < call.group_count; ++pair) {
      const uint8_t byte = w[pair];
      sum += static_cast<int8_t>(a[2 * pair]) * nibble(byte, 0);
      sum += static_cast<int8_t>(a[2 * pair + 1]) * nibble(byte, 1);
    }
    *acc = sum;
  }
};

struct A8T4 {
  static constexpr int kM = 1, kN = 1, kZero = 0;
  template <int M>
  static void tile(const MatmulCall& call, const uint8_t* a, const uint8_t* w, int32_t* acc) {
    int32_t sum = 0;
    for (int pair = 0; pair < call.group_count; ++pair) {
      const uint8_t byte = w[pair];
      sum += static_cast<int8_t>(a[2 * pair]) * call.levels[byte & 15];
      sum += static_cast<int8_t>(a[2 * pair + 1]) * call.levels[byte >> 4];
    }
    *acc = sum;
  }
};

}  // namespace

void matmul_a8_w8_1x1x1_reference(const MatmulCall& call) { for_each_tile<InMemory<A8W8>>(call); }
void matmul_a8_w4_1x1x1_reference(const MatmulCall& call) { for_each_tile<InMemory<A8W4>>(call); }
void matmul_a8_t4_1x1x1_reference(const MatmulCall& call) { for_each_tile<InMemory<A8T4>>(call); }

namespace {

// NaN becomes 0; std::nearbyint rounds ties to even in the default rounding mode.
int quantize_one(float x, float inverse_step, int low, int high) {
  const float scaled = x * inverse_step;
  if (std::isnan(scaled)) return 0;
  if (scaled <= static_cast<float>(low)) return low;
  if (scaled >= static_cast<float>(high)) return high;
  return static_cast<int>(std::nearbyint(scaled));
}

}  // namespace

void quantize_reference(const float* x, int n, float inverse_step, int low, int high,
                        int8_t* codes) {
  for (int i = 0; i < n; ++i) {
    codes[i] = static_cast<int8_t>(quantize_one(x[i], inverse_step, low, high));
  }
}

}  // namespace squat::kernels
