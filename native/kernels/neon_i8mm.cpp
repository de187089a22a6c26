// NEON with products of 2 x 8 by 8 x 2 matrices of bytes (SMMLA; i8mm of ARMv8.6, for instance
// Cortex-X2, Neoverse V1): tiles of 8 tokens x 8 weight rows, 16 of the 32 registers being sums.
//
// A vector holds eight codes of k for two tokens or for two weight rows; a sum holds the four
// results of two tokens and two rows. Nibbles stay in the upper half of their byte, that is times
// 16, and the sums are divided by 16 at the end, exactly. Nibbles that stand for levels are looked
// up (TBL).
#include <arm_neon.h>

#include "micro.h"

namespace squat::kernels {
namespace {

constexpr int kTokens = 8, kRows = 8;

SQUAT_INLINE int8x16_t load(const uint8_t* from) {
  return vld1q_s8(reinterpret_cast<const int8_t*>(from));
}

template <int M>
struct Sums {
  static constexpr int kPairs = (M + 1) / 2;  // pairs of tokens; an odd last one is with zeros
  int32x4_t at[kPairs][kRows / 2];

  SQUAT_INLINE Sums() {
    unroll<kPairs>([&](auto i) SQUAT_LAMBDA {
      unroll<kRows / 2>([&](auto j) SQUAT_LAMBDA { at[i][j] = vdupq_n_s32(0); });
    });
  }

  // `weights` holds eight codes of all rows of the panel.
  SQUAT_INLINE void add_group(const uint8_t* a, const int8x16_t (&weights)[kRows / 2]) {
    unroll<kPairs>([&](auto i) SQUAT_LAMBDA {
      int8x16_t codes;
      if constexpr (2 * i + 1 < M) {
        codes = load(a + 16 * i);
      } else {
        codes = vcombine_s8(vld1_s8(reinterpret_cast<const int8_t*>(a + 16 * i)), vdup_n_s8(0));
      }
      unroll<kRows / 2>([&](auto j)
                            SQUAT_LAMBDA { at[i][j] = vmmlaq_s32(at[i][j], codes, weights[j]); });
    });
  }

  template <int Shift>
  SQUAT_INLINE void write(int32_t* acc) const {
    unroll<kPairs>([&](auto i) SQUAT_LAMBDA {
      unroll<kRows / 2>([&](auto j) SQUAT_LAMBDA {
        const int32x4_t sum = vshlq_s32(at[i][j], vdupq_n_s32(-Shift));
        int32_t* to = acc + 2 * i * kRows + 2 * j;
        vst1_s32(to, vget_low_s32(sum));
        if constexpr (2 * i + 1 < M) vst1_s32(to + kRows, vget_high_s32(sum));
      });
    });
  }
};

struct W8 {
  static constexpr int kM = kTokens, kN = kRows, kZero = 0;
  template <int M>
  static void tile(const MatmulCall& call, const uint8_t* a, const uint8_t* w, int32_t* acc) {
    Sums<M> sums;
    for (int group = 0; group < call.group_count; ++group) {
      int8x16_t weights[kRows / 2];
      unroll<kRows / 2>([&](auto j) SQUAT_LAMBDA { weights[j] = load(w + 16 * j); });
      sums.add_group(a, weights);
      w += 8 * kN;
      a += 8 * M;
    }
    sums.template write<0>(acc);
  }
};

struct W4 {
  static constexpr int kM = kTokens, kN = kRows, kZero = 0;
  template <int M>
  static void tile(const MatmulCall& call, const uint8_t* a, const uint8_t* w, int32_t* acc) {
    Sums<M> sums;
    for (int pair = 0; pair < call.group_count; ++pair) {
      int8x16_t low[kRows / 2], high[kRows / 2];
      unroll<kRows / 2>([&](auto j) SQUAT_LAMBDA {
        const int8x16_t both = load(w + 16 * j);
        low[j] = vshlq_n_s8(both, 4);
        high[j] = vandq_s8(both, vdupq_n_s8(-16));
      });
      sums.add_group(a, low);
      sums.add_group(a + 8 * M, high);
      w += 8 * kN;
      a += 16 * M;
    }
    sums.template write<4>(acc);
  }
};

struct T4 {
  static constexpr int kM = kTokens, kN = kRows, kZero = 0;
  template <int M>
  static void tile(const MatmulCall& call, const uint8_t* a, const uint8_t* w, int32_t* acc) {
    const int8x16_t levels = vld1q_s8(call.levels);
    Sums<M> sums;
    for (int pair = 0; pair < call.group_count; ++pair) {
      int8x16_t low[kRows / 2], high[kRows / 2];
      unroll<kRows / 2>([&](auto j) SQUAT_LAMBDA {
        const uint8x16_t both = vld1q_u8(w + 16 * j);
        low[j] = vqtbl1q_s8(levels, vandq_u8(both, vdupq_n_u8(15)));
        high[j] = vqtbl1q_s8(levels, vshrq_n_u8(both, 4));
      });
      sums.add_group(a, low);
      sums.add_group(a + 8 * M, high);
      w += 8 * kN;
      a += 16 * M;
    }
    sums.template write<0>(acc);
  }
};

}  // namespace

void matmul_a8_w8_8x8x8_i8mm(const MatmulCall& call) { for_each_tile<InMemory<W8>>(call); }
void matmul_a8_w4_8x8x8_i8mm(const MatmulCall& call) { for_each_tile<InMemory<W4>>(call); }
void matmul_a8_t4_8x8x8_i8mm(const MatmulCall& call) { for_each_tile<InMemory<T4>>(call); }

}  // namespace squat::kernels
