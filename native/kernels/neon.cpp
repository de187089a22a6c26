// NEON without dot products (Cortex-A53, A72): sixteen codes of k of one row in a vector.
//
// 4-bit x 4-bit. A product fits 8 bits, and two of them nearly do: with the activations negated
// each lies in -64..56, so that MUL and MLA on bytes, 16 multiplications each, cannot overflow, and
// SADALP adds the bytes in pairs to 16 bits. Three instructions for 32 multiplications.
//
// 8-bit x 4-bit. SMLAL adds eight products of up to 2^10 to 16-bit lanes, 31 times before they
// could overflow. Four instructions for 32 multiplications.
//
// 8-bit x 8-bit. One product fills 16 bits: SMULL, then SADALP to 32. Eight for 32. 4-bit codes
// that stand for levels are looked up, sixteen by one TBL, and go the same way.
//
// The paper's INT4 multiplier is kept beside the first for comparison: two 4-bit weights of
// adjacent rows in one 16-bit lane, times one activation that they share. Two steps fit before the
// halves have to be split; with the copy of the value that they start from this is five
// instructions for 32 multiplications. In exchange no sums have to be added up across lanes.
#include <arm_neon.h>

#include "micro.h"

namespace squat::kernels {
namespace {

SQUAT_INLINE int8x16_t load(const uint8_t* from) {
  return vld1q_s8(reinterpret_cast<const int8_t*>(from));
}
SQUAT_INLINE int8x16_t low_nibbles(int8x16_t v) { return vshrq_n_s8(vshlq_n_s8(v, 4), 4); }
SQUAT_INLINE int8x16_t high_nibbles(int8x16_t v) { return vshrq_n_s8(v, 4); }
SQUAT_INLINE uint8x16_t low_indices(uint8x16_t v) { return vandq_u8(v, vdupq_n_u8(15)); }
SQUAT_INLINE uint8x16_t high_indices(uint8x16_t v) { return vshrq_n_u8(v, 4); }

// Adds up the lanes of four sums: the results of four neighbouring weight rows.
SQUAT_INLINE int32x4_t add_across(const int32x4_t* sums) {
  return vpaddq_s32(vpaddq_s32(sums[0], sums[1]), vpaddq_s32(sums[2], sums[3]));
}

// One step over 32 codes of k: adds to the 16-bit sums of one token and one weight row.
struct A4W4 {
  static constexpr int kPairs = 127;  // 127 * 256 < 2^15
  static constexpr bool kNegated = true;
  SQUAT_INLINE static int16x8_t step(int16x8_t sum, int8x16_t w0, int8x16_t w1, int8x16_t a0,
                                     int8x16_t a1) {
    return vpadalq_s8(sum, vmlaq_s8(vmulq_s8(w0, a0), w1, a1));
  }
};

struct A8W4 {
  static constexpr int kPairs = 7;  // 7 * 4 * 1024 < 2^15
  static constexpr bool kNegated = false;
  SQUAT_INLINE static int16x8_t step(int16x8_t sum, int8x16_t w0, int8x16_t w1, int8x16_t a0,
                                     int8x16_t a1) {
    sum = vmlal_s8(sum, vget_low_s8(w0), vget_low_s8(a0));
    sum = vmlal_high_s8(sum, w0, a0);
    sum = vmlal_s8(sum, vget_low_s8(w1), vget_low_s8(a1));
    return vmlal_high_s8(sum, w1, a1);
  }
};

template <class Codes>
struct W4 {
  static constexpr int kM = 4, kN = 4, kZero = 0;
  template <int M>
  static void tile(const MatmulCall& call, const uint8_t* a, const uint8_t* w, int32_t* acc) {
    int32x4_t wide[M * kN];  // in memory: it is needed once in kPairs steps
    for (auto& sum : wide) sum = vdupq_n_s32(0);
    for (int first = 0; first < call.group_count; first += Codes::kPairs) {
      const int last = smaller(first + Codes::kPairs, call.group_count);
      int16x8_t sums[M * kN];
      unroll<M * kN>([&](auto i) SQUAT_LAMBDA { sums[i] = vdupq_n_s16(0); });
      for (int pair = first; pair < last; ++pair) {
        int8x16_t codes[2 * M];
        unroll<2 * M>([&](auto i) SQUAT_LAMBDA { codes[i] = load(a + 16 * i); });
        unroll<kN>([&](auto j) SQUAT_LAMBDA {
          const int8x16_t both = load(w + 16 * j);
          const int8x16_t w0 = low_nibbles(both), w1 = high_nibbles(both);
          unroll<M>([&](auto i) SQUAT_LAMBDA {
            auto& sum = sums[i * kN + j];
            sum = Codes::step(sum, w0, w1, codes[i], codes[M + i]);
          });
        });
        w += 16 * kN;
        a += 32 * M;
      }
      unroll<M * kN>([&](auto i) SQUAT_LAMBDA { wide[i] = vpadalq_s16(wide[i], sums[i]); });
    }
    for (int i = 0; i < M; ++i) {
      const int32x4_t sum = add_across(wide + i * kN);
      vst1q_s32(acc + i * kN, Codes::kNegated ? vnegq_s32(sum) : sum);
    }
  }
};

// Sums of products of bytes, in 32 bits.
template <int M, int N>
struct ByteSums {
  int32x4_t at[M * N];

  SQUAT_INLINE ByteSums() {
    unroll<M * N>([&](auto i) SQUAT_LAMBDA { at[i] = vdupq_n_s32(0); });
  }

  // Multiplies sixteen codes of M tokens with sixteen of each row, row(j).
  template <class Row>
  SQUAT_INLINE void add_group(const uint8_t* a, Row row) {
    int8x16_t codes[M];
    unroll<M>([&](auto i) SQUAT_LAMBDA { codes[i] = load(a + 16 * i); });
    unroll<N>([&](auto j) SQUAT_LAMBDA {
      const int8x16_t of_row = row(j);
      unroll<M>([&](auto i) SQUAT_LAMBDA {
        auto& sum = at[i * N + j];
        sum = vpadalq_s16(sum, vmull_s8(vget_low_s8(of_row), vget_low_s8(codes[i])));
        sum = vpadalq_s16(sum, vmull_high_s8(of_row, codes[i]));
      });
    });
  }

  SQUAT_INLINE void write(int32_t* acc) const {
    unroll<M>([&](auto i) SQUAT_LAMBDA { vst1q_s32(acc + i * N, add_across(at + i * N)); });
  }
};

struct A8W8 {
  static constexpr int kM = 4, kN = 4, kZero = 0;
  template <int M>
  static void tile(const MatmulCall& call, const uint8_t* a, const uint8_t* w, int32_t* acc) {
    ByteSums<M, kN> sums;
    for (int group = 0; group < call.group_count; ++group) {
      sums.add_group(a, [&](auto j) SQUAT_LAMBDA { return load(w + 16 * j); });
      w += 16 * kN;
      a += 16 * M;
    }
    sums.write(acc);
  }
};

struct A8T4 {
  static constexpr int kM = 4, kN = 4, kZero = 0;
  template <int M>
  static void tile(const MatmulCall& call, const uint8_t* a, const uint8_t* w, int32_t* acc) {
    const int8x16_t levels = vld1q_s8(call.levels);
    ByteSums<M, kN> sums;
    for (int pair = 0; pair < call.group_count; ++pair) {
      sums.add_group(a, [&](auto j) SQUAT_LAMBDA {
        return vqtbl1q_s8(levels, low_indices(vld1q_u8(w + 16 * j)));
      });
      sums.add_group(a + 16 * M, [&](auto j) SQUAT_LAMBDA {
        return vqtbl1q_s8(levels, high_indices(vld1q_u8(w + 16 * j)));
      });
      w += 16 * kN;
      a += 32 * M;
    }
    sums.write(acc);
  }
};

// The paper's INT4 multiplier. A vector of weights is 16 rows, two in a lane; one k at a time. Two
// products add up to -112..128 in each half of a lane, which kBias makes 0..240, so that nothing is
// borrowed between the halves. The upper ones are added up after a shift; the lower ones are what
// the sum of the whole lanes, modulo 2^16, has beyond that.
struct Concatenated {
  static constexpr int kM = 8, kN = 16, kZero = 0;  // the offset of 8 is taken off in concatenate()
  static constexpr int kBias = 112;
  static constexpr int kPairs = 255;  // 255 * 240 < 2^16

  // The codes of row r + 1 times 256 plus those of row r, from nibbles that hold code + 8.
  SQUAT_INLINE static int16x8_t concatenate(uint8x16_t nibbles) {
    return vsubq_s16(vreinterpretq_s16_u8(nibbles), vdupq_n_s16(8 * 256 + 8));
  }

  // The codes of M tokens, in the first M lanes.
  template <int M>
  SQUAT_INLINE static int16x8_t load_codes(const uint8_t* from) {
    int16_t codes[8] = {};
    __builtin_memcpy(codes, from, M * sizeof(int16_t));
    return vld1q_s16(codes);
  }

  // Adds the sums of one token over `steps` steps to those of eight rows.
  SQUAT_INLINE static void add_rows(int32_t* to, uint16x8_t sums, int steps) {
    const int32x4_t bias = vdupq_n_s32(kBias * steps);
    const int32x4_t left = vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(sums)));
    const int32x4_t right = vreinterpretq_s32_u32(vmovl_high_u16(sums));
    vst1q_s32(to, vaddq_s32(vld1q_s32(to), vsubq_s32(left, bias)));
    vst1q_s32(to + 4, vaddq_s32(vld1q_s32(to + 4), vsubq_s32(right, bias)));
  }

  template <int M>
  static void tile(const MatmulCall& call, const uint8_t* a, const uint8_t* w, int32_t* acc) {
    const int16x8_t bias = vdupq_n_s16(kBias * 256 + kBias);
    for (int i = 0; i < M * kN; ++i) acc[i] = 0;
    for (int first = 0; first < call.group_count; first += kPairs) {
      const int last = smaller(first + kPairs, call.group_count);
      uint16x8_t total[M], high[M];
      unroll<M>([&](auto i) SQUAT_LAMBDA { total[i] = high[i] = vdupq_n_u16(0); });
      for (int pair = first; pair < last; ++pair) {
        const uint8x16_t both = vld1q_u8(w);
        const int16x8_t w0 = concatenate(vandq_u8(both, vdupq_n_u8(15)));
        const int16x8_t w1 = concatenate(vshrq_n_u8(both, 4));
        const int16x8_t a0 = load_codes<M>(a), a1 = load_codes<M>(a + 2 * M);
        unroll<M>([&](auto i) SQUAT_LAMBDA {
          const int16x8_t step = vmlaq_laneq_s16(bias, w0, a0, decltype(i)());
          const uint16x8_t sum =
              vreinterpretq_u16_s16(vmlaq_laneq_s16(step, w1, a1, decltype(i)()));
          total[i] = vaddq_u16(total[i], sum);
          high[i] = vsraq_n_u16(high[i], sum, 8);
        });
        w += kN;
        a += 4 * M;
      }
      unroll<M>([&](auto i) SQUAT_LAMBDA {
        const uint16x8_t low = vsubq_u16(total[i], vshlq_n_u16(high[i], 8));
        add_rows(acc + i * kN, vzip1q_u16(low, high[i]), last - first);
        add_rows(acc + i * kN + 8, vzip2q_u16(low, high[i]), last - first);
      });
    }
  }
};

// Rounds to nearest, ties to even; the conversion makes NaN 0.
SQUAT_INLINE int16x4_t quantize_four(float32x4_t x, float32x4_t inverse, float32x4_t low,
                                     float32x4_t high) {
  const float32x4_t clamped = vminq_f32(vmaxq_f32(vmulq_f32(x, inverse), low), high);
  return vmovn_s32(vcvtnq_s32_f32(clamped));
}

}  // namespace

void matmul_a8_w8_4x4x16_neon(const MatmulCall& call) { for_each_tile<InMemory<A8W8>>(call); }
void matmul_a8_w4_4x4x16_neon(const MatmulCall& call) { for_each_tile<InMemory<W4<A8W4>>>(call); }
void matmul_a4_w4_4x4x16_neon(const MatmulCall& call) { for_each_tile<InMemory<W4<A4W4>>>(call); }
void matmul_a8_t4_4x4x16_neon(const MatmulCall& call) { for_each_tile<InMemory<A8T4>>(call); }
void matmul_a4_w4_8x16x1_neon(const MatmulCall& call) {
  for_each_tile<InMemory<Concatenated>>(call);
}

void quantize_neon(const float* x, int n, float inverse_step, int low, int high, int8_t* codes) {
  uint8_t* bytes = reinterpret_cast<uint8_t*>(codes);
  const float32x4_t inverse = vdupq_n_f32(inverse_step);
  const float32x4_t bottom = vdupq_n_f32(static_cast<float>(low));
  const float32x4_t top = vdupq_n_f32(static_cast<float>(high));
  const auto eight = [&](const float* from) {
    const int16x4_t left = quantize_four(vld1q_f32(from), inverse, bottom, top);
    const int16x4_t right = quantize_four(vld1q_f32(from + 4), inverse, bottom, top);
    return vreinterpret_u8_s8(vmovn_s16(vcombine_s16(left, right)));
  };
  int i = 0;
  for (; i + 8 <= n; i += 8) vst1_u8(bytes + i, eight(x + i));
  if (i < n) {
    float in[8] = {};
    uint8_t out[8];
    for (int j = 0; j < n - i; ++j) in[j] = x[i + j];
    vst1_u8(out, eight(in));
    for (int j = 0; j < n - i; ++j) bytes[i + j] = out[j];
  }
}

}  // namespace squat::kernels
