// The portable reference: plain loops, the definition of what every other kernel must return.
#include <cmath>

#include "micro.h"

namespace squat::kernels {
namespace {

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

// What a nibble stands for: a code in two's complement, or a level of the call's table.
struct Code {
  static int of(const MatmulCall&, int nibble) { return nibble < 8 ? nibble : nibble - 16; }
};
struct Level {
  static int of(const MatmulCall& call, int nibble) { return call.levels[nibble]; }
};

template <class Number>
struct A8Nibbles {
  static constexpr int kM = 1, kN = 1, kZero = 0;
  template <int M>
  static void tile(const MatmulCall& call, const uint8_t* a, const uint8_t* w, int32_t* acc) {
    int32_t sum = 0;
    for (int pair = 0; pair < call.group_count; ++pair) {
      sum += static_cast<int8_t>(a[2 * pair]) * Number::of(call, w[pair] & 15);
      sum += static_cast<int8_t>(a[2 * pair + 1]) * Number::of(call, w[pair] >> 4);
    }
    *acc = sum;
  }
};

using A8W4 = A8Nibbles<Code>;
using A8T4 = A8Nibbles<Level>;

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
