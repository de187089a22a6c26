// NEON with dot products of four bytes (SDOT; ARMv8.2, for instance Cortex-A76): tiles of 8 tokens
// x 8 weight rows, 16 of the 32 registers being sums.
//
// A vector of weights holds four codes of k for each of four rows, a vector of activations the same
// four of k for each of four tokens, of which the instruction selects one. Nibbles stay in the
// upper half of their byte, that is times 16, which takes one instruction instead of two or three;
// the sums are divided by 16 at the end, exactly. Nibbles that stand for levels are looked up
// (TBL).
#include <arm_neon.h>

#include "micro.h"

namespace squat::kernels {
namespace {

constexpr int kTokens = 8, kRows = 8;

SQUAT_INLINE int8x16_t load(const uint8_t* from) {
  return vld1q_s8(reinterpret_cast<const int8_t*>(from));
}

// Four codes of one token in every lane.
SQUAT_INLINE int8x16_t broadcast(const uint8_t* from) {
  int32_t codes;
  __builtin_memcpy(&codes, from, sizeof(codes));
  return vreinterpretq_s8_s32(vdupq_n_s32(codes));
}

template <int M>
struct Sums {
  int32x4_t at[M][2];

  SQUAT_INLINE Sums() {
    unroll<M>([&](auto i) SQUAT_LAMBDA { at[i][0] = at[i][1] = vdupq_n_s32(0); });
  }

  SQUAT_INLINE void add_group(const uint8_t* a, int8x16_t w0, int8x16_t w1) {
    unroll<M / 4>([&](auto quad) SQUAT_LAMBDA {
      const int8x16_t codes = load(a + 16 * quad);
      unroll<4>([&](auto lane) SQUAT_LAMBDA {
        auto& sums = at[4 * quad + lane];
        sums[0] = vdotq_laneq_s32(sums[0], w0, codes, decltype(lane)());
        sums[1] = vdotq_laneq_s32(sums[1], w1, codes, decltype(lane)());
      });
    });
    unroll<M % 4>([&](auto rest) SQUAT_LAMBDA {
      constexpr int i = M / 4 * 4 + decltype(rest)();
      const int8x16_t codes = broadcast(a + 4 * i);
      at[i][0] = vdotq_s32(at[i][0], w0, codes);
      at[i][1] = vdotq_s32(at[i][1], w1, codes);
    });
  }

  template <int Shift>
  SQUAT_INLINE void write(int32_t* acc) const {
    unroll<M>([&](auto i) SQUAT_LAMBDA {
      vst1q_s32(acc + i * kRows, vshlq_s32(at[i][0], vdupq_n_s32(-Shift)));
      vst1q_s32(acc + i * kRows + 4, vshlq_s32(at[i][1], vdupq_n_s32(-Shift)));
    });
  }
};

struct W8 {
  static constexpr int kM = kTokens, kN = kRows, kZero = 0;
  template <int M>
  static void tile(const MatmulCall& call, const uint8_t* a, const uint8_t* w, int32_t* acc) {
    Sums<M> sums;
    for (int group = 0; group < call.group_count; ++group) {
      sums.add_group(a, load(w), load(w + 16));
      w += 4 * kN;
      a += 4 * M;
    }
    sums.template write<0>(acc);
  }
};

struct W4 {
  static constexpr int kM = kTokens, kN = kRows, kZero = 0;
  template <int M>
  static void tile(const MatmulCall& call, const uint8_t* a, const uint8_t* w, int32_t* acc) {
    const int8x16_t high = vdupq_n_s8(-16);
    Sums<M> sums;
    for (int pair = 0; pair < call.group_count; ++pair) {
      const int8x16_t w0 = load(w), w1 = load(w + 16);
      sums.add_group(a, vshlq_n_s8(w0, 4), vshlq_n_s8(w1, 4));
      sums.add_group(a + 4 * M, vandq_s8(w0, high), vandq_s8(w1, high));
      w += 4 * kN;
      a += 8 * M;
    }
    sums.template write<4>(acc);
  }
};

struct T4 {
  static constexpr int kM = kTokens, kN = kRows, kZero = 0;
  template <int M>
  static void tile(const MatmulCall& call, const uint8_t* a, const uint8_t* w, int32_t* acc) {
    const int8x16_t levels = vld1q_s8(call.levels);
    const auto low = [&](uint8x16_t v)
                         SQUAT_LAMBDA { return vqtbl1q_s8(levels, vandq_u8(v, vdupq_n_u8(15))); };
    const auto high = [&](uint8x16_t v)
                          SQUAT_LAMBDA { return vqtbl1q_s8(levels, vshrq_n_u8(v, 4)); };
    Sums<M> sums;
    for (int pair = 0; pair < call.group_count; ++pair) {
      const uint8x16_t w0 = vld1q_u8(w), w1 = vld1q_u8(w + 16);
      sums.add_group(a, low(w0), low(w1));
      sums.add_group(a + 4 * M, high(w0), high(w1));
      w += 4 * kN;
      a += 8 * M;
    }
    sums.template write<0>(acc);
  }
};

}  // namespace

void matmul_a8_w8_8x8x4_dotprod(const MatmulCall& call) { for_each_tile<InMemory<W8>>(call); }
void matmul_a8_w4_8x8x4_dotprod(const MatmulCall& call) { for_each_tile<InMemory<W4>>(call); }
void matmul_a8_t4_8x8x4_dotprod(const MatmulCall& call) { for_each_tile<InMemory<T4>>(call); }

}  // namespace squat::kernels
