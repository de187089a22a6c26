// AVX-VNNI, for CPUs with byte dot products but without AVX-512: tiles of 6 tokens x 16 weight
// rows, 12 of the 16 registers being sums.
#include <immintrin.h>

#include "vnni.h"

namespace squat::kernels {
namespace {

struct Ymm {
  using Type = __m256i;
  static constexpr int kLanes = 8;
  static Type zero() { return _mm256_setzero_si256(); }
  static Type load(const void* from) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(from));
  }
  static void write(void* to, Type v) { _mm256_storeu_si256(static_cast<__m256i*>(to), v); }
  static Type broadcast(const void* from) {
    return _mm256_set1_epi32(_mm_cvtsi128_si32(_mm_loadu_si32(from)));
  }
  static Type low(Type v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
  static Type high(Type v) { return low(_mm256_srli_epi16(v, 4)); }
  static Type dot(Type acc, Type u, Type s) { return _mm256_dpbusd_avx_epi32(acc, u, s); }
  static Type add(Type a, Type b) { return _mm256_add_epi32(a, b); }
  static Type splat(int32_t x) { return _mm256_set1_epi32(x); }
  static Type subtract(Type a, Type b) { return _mm256_sub_epi32(a, b); }
  static Type times128(Type v) { return _mm256_slli_epi32(v, 7); }
  static Type unsigned_table(const int8_t* levels) {
    const __m128i signed_levels = _mm_loadu_si128(reinterpret_cast<const __m128i*>(levels));
    return _mm256_broadcastsi128_si256(_mm_xor_si128(signed_levels, _mm_set1_epi8(-128)));
  }
  static Type lookup(Type table, Type nibbles) { return _mm256_shuffle_epi8(table, nibbles); }

  using FloatType = __m256;
  static FloatType splat(float x) { return _mm256_set1_ps(x); }
  static FloatType load(const float* from) { return _mm256_loadu_ps(from); }
  static FloatType to_float(Type v) { return _mm256_cvtepi32_ps(v); }
  static FloatType multiply(FloatType a, FloatType b) { return _mm256_mul_ps(a, b); }
  static FloatType add(FloatType a, FloatType b) { return _mm256_add_ps(a, b); }
  static void write(float* to, FloatType v) { _mm256_storeu_ps(to, v); }
};

}  // namespace

void matmul_a8_w8_6x16x4_avxvnni(const MatmulCall& call) { for_each_tile<VnniW8<Ymm, 6>>(call); }
void matmul_a8_w4_6x16x4_avxvnni(const MatmulCall& call) { for_each_tile<VnniW4<Ymm, 6>>(call); }
void matmul_a8_t4_6x16x4_avxvnni(const MatmulCall& call) { for_each_tile<VnniT4<Ymm, 6>>(call); }

}  // namespace squat::kernels
