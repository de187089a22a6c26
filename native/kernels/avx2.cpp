// AVX2, which has no byte dot product that is both exact and 32 bits wide.
//
// 4-bit weights, held as code + 8 (0..15), fit VPMADDUBSW: unsigned x signed bytes, two products
// added in 16 bits. A pair reaches 15 * 128 * 2 = 3840 with 8-bit activations, so that 8 of them
// can be added before 16 bits overflow, and only 15 * 8 * 2 = 240 with 4-bit ones, good for 136. So
// with 4-bit activations the widening to 32 bits all but disappears: what the paper's INT4
// multiplier is after. 8-bit x 8-bit pairs would saturate; these go through 16-bit products
// (VPMADDWD), and so do 4-bit codes that stand for levels: PSHUFB looks up 32 of them.
#include <immintrin.h>

#include "sums.h"

namespace squat::kernels {
namespace {

constexpr int kTokens = 6, kRows = 16;  // a tile is 6 tokens x 16 weight rows

SQUAT_INLINE __m256i load(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}
SQUAT_INLINE void store(void* to, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(to), v); }
SQUAT_INLINE __m256i low_nibbles(__m256i v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
SQUAT_INLINE __m256i high_nibbles(__m256i v) { return low_nibbles(_mm256_srli_epi16(v, 4)); }

// Keeps the compiler from adding products to each other before adding them to their sum: that needs
// more registers than there are.
SQUAT_INLINE __m256i pinned(__m256i sum) {
  __asm__("" : "+x"(sum));
  return sum;
}

struct Ymm {
  using Type = __m256i;
  static constexpr int kLanes = 8;
  static Type zero() { return _mm256_setzero_si256(); }
  static Type broadcast(const void* from) {
    return _mm256_set1_epi32(_mm_cvtsi128_si32(_mm_loadu_si32(from)));
  }
};

// 16-bit sums of bytes, which are added to the results when they are written.
struct Bytes : Ymm {
  static Type dot(Type acc, Type u, Type s) {
    return pinned(_mm256_add_epi16(acc, _mm256_maddubs_epi16(u, s)));
  }
  static void write(int32_t* to, Type acc) {
    store(to, _mm256_add_epi32(load(to), _mm256_madd_epi16(acc, _mm256_set1_epi16(1))));
  }
};

// 32-bit sums of 16-bit words.
struct Words : Ymm {
  static Type dot(Type acc, Type a, Type b) {
    return pinned(_mm256_add_epi32(acc, _mm256_madd_epi16(a, b)));
  }
  static void write(int32_t* to, Type acc) { store(to, acc); }
};

// `Pairs`: how many pairs of groups can be added in 16 bits.
template <int Pairs>
struct W4 {
  static constexpr int kM = kTokens, kN = kRows, kZero = 8;
  template <int M>
  static void tile(const MatmulCall& call, const uint8_t* a, const uint8_t* w, int32_t* acc) {
    for (int i = 0; i < M * kN; i += 8) store(acc + i, Ymm::zero());
    for (int first = 0; first < call.group_count; first += Pairs) {
      const int last = smaller(first + Pairs, call.group_count);
      Sums<Bytes, M> sums;
      for (int pair = first; pair < last; ++pair) {
        const __m256i w0 = load(w), w1 = load(w + 32);
        sums.add_group(a, low_nibbles(w0), low_nibbles(w1));
        sums.add_group(a + 4 * M, high_nibbles(w0), high_nibbles(w1));
        w += 4 * kN;
        a += 8 * M;
      }
      sums.write(acc);
    }
  }
};

// Multiplies a group of two codes of 16 bits of each token with two of 8 bits of each weight row.
template <int M>
SQUAT_INLINE void add_bytes(Sums<Words, M>& sums, const uint8_t* a, __m256i bytes) {
  sums.add_group(a, _mm256_cvtepi8_epi16(_mm256_castsi256_si128(bytes)),
                 _mm256_cvtepi8_epi16(_mm256_extracti128_si256(bytes, 1)));
}

struct A8W8 {
  static constexpr int kM = kTokens, kN = kRows, kZero = 0;
  template <int M>
  static void tile(const MatmulCall& call, const uint8_t* a, const uint8_t* w, int32_t* acc) {
    Sums<Words, M> sums;
    for (int group = 0; group < call.group_count; ++group) {
      add_bytes(sums, a, load(w));
      w += 2 * kN;
      a += 4 * M;
    }
    sums.write(acc);
  }
};

struct A8T4 {
  static constexpr int kM = kTokens, kN = kRows, kZero = 0;
  template <int M>
  static void tile(const MatmulCall& call, const uint8_t* a, const uint8_t* w, int32_t* acc) {
    const __m256i levels =
        _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(call.levels)));
    Sums<Words, M> sums;
    for (int pair = 0; pair < call.group_count; ++pair) {
      const __m256i both = load(w);
      add_bytes(sums, a, _mm256_shuffle_epi8(levels, low_nibbles(both)));
      add_bytes(sums, a + 4 * M, _mm256_shuffle_epi8(levels, high_nibbles(both)));
      w += 2 * kN;
      a += 8 * M;
    }
    sums.write(acc);
  }
};

// Eight codes in the low byte of each lane. Rounds in the default mode, ties to even; comparing
// with itself finds NaN.
inline __m256i quantize_eight(__m256 x, __m256 inverse, __m256 low, __m256 high) {
  const __m256 scaled = _mm256_mul_ps(x, inverse);
  const __m256 number = _mm256_cmp_ps(scaled, scaled, _CMP_ORD_Q);
  const __m256 clamped = _mm256_min_ps(_mm256_max_ps(scaled, low), high);
  return _mm256_and_si256(_mm256_cvtps_epi32(clamped), _mm256_castps_si256(number));
}

// The low bytes of eight lanes, next to each other.
inline __m128i low_bytes(__m256i v) {
  const __m256i gather =
      _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8, 12, -1,
                       -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i bytes = _mm256_shuffle_epi8(v, gather);
  return _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
}

}  // namespace

void matmul_a8_w8_6x16x2_avx2(const MatmulCall& call) { for_each_tile<InMemory<A8W8>>(call); }
void matmul_a8_w4_6x16x4_avx2(const MatmulCall& call) { for_each_tile<InMemory<W4<4>>>(call); }
void matmul_a4_w4_6x16x4_avx2(const MatmulCall& call) { for_each_tile<InMemory<W4<64>>>(call); }
void matmul_a8_t4_6x16x2_avx2(const MatmulCall& call) { for_each_tile<InMemory<A8T4>>(call); }

void quantize_avx2(const float* x, int n, float inverse_step, int low, int high, int8_t* codes) {
  uint8_t* bytes = reinterpret_cast<uint8_t*>(codes);
  const __m256 inverse = _mm256_set1_ps(inverse_step);
  const __m256 bottom = _mm256_set1_ps(static_cast<float>(low));
  const __m256 top = _mm256_set1_ps(static_cast<float>(high));
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256i eight = quantize_eight(_mm256_loadu_ps(x + i), inverse, bottom, top);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(bytes + i), low_bytes(eight));
  }
  if (i < n) {
    float in[8] = {};
    alignas(16) uint8_t out[16];
    for (int j = 0; j < n - i; ++j) in[j] = x[i + j];
    const __m256i eight = quantize_eight(_mm256_loadu_ps(in), inverse, bottom, top);
    _mm_store_si128(reinterpret_cast<__m128i*>(out), low_bytes(eight));
    for (int j = 0; j < n - i; ++j) bytes[i + j] = out[j];
  }
}

}  // namespace squat::kernels
