// AVX-512 with VNNI: tiles of 12 tokens x 32 weight rows, 24 of the 32 registers being sums.
#include <immintrin.h>

#include "vnni.h"

namespace squat::kernels {
namespace {

struct Zmm {
  using Type = __m512i;
  static constexpr int kLanes = 16;
  static Type zero() { return _mm512_setzero_si512(); }
  static Type load(const void* from) { return _mm512_loadu_si512(from); }
  static void write(void* to, Type v) { _mm512_storeu_si512(to, v); }
  static Type broadcast(const void* from) {
    return _mm512_set1_epi32(_mm_cvtsi128_si32(_mm_loadu_si32(from)));
  }
  static Type low(Type v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
  static Type high(Type v) { return low(_mm512_srli_epi16(v, 4)); }
  static Type dot(Type acc, Type u, Type s) { return _mm512_dpbusd_epi32(acc, u, s); }
  static Type add(Type a, Type b) { return _mm512_add_epi32(a, b); }
  static Type splat(int32_t x) { return _mm512_set1_epi32(x); }
  static Type subtract(Type a, Type b) { return _mm512_sub_epi32(a, b); }
  static Type times128(Type v) { return _mm512_slli_epi32(v, 7); }
  static Type unsigned_table(const int8_t* levels) {
    const __m128i signed_levels = _mm_loadu_si128(reinterpret_cast<const __m128i*>(levels));
    const __m128i table = _mm_xor_si128(signed_levels, _mm_set1_epi8(-128));
    return _mm512_maskz_broadcast_i32x4(0xffff, table);  // GCC 12 warns of the one without a mask
  }
  static Type lookup(Type table, Type nibbles) { return _mm512_shuffle_epi8(table, nibbles); }

  using FloatType = __m512;
  static FloatType splat(float x) { return _mm512_set1_ps(x); }
  static FloatType load(const float* from) { return _mm512_loadu_ps(from); }
  static FloatType to_float(Type v) { return _mm512_cvtepi32_ps(v); }
  static FloatType multiply(FloatType a, FloatType b) { return _mm512_mul_ps(a, b); }
  static FloatType add(FloatType a, FloatType b) { return _mm512_add_ps(a, b); }
  static void write(float* to, FloatType v) { _mm512_storeu_ps(to, v); }
};

}  // namespace

void matmul_a8_w8_12x32x4_avx512vnni(const MatmulCall& call) {
  for_each_tile<VnniW8<Zmm, 12>>(call);
}

void matmul_a8_w4_12x32x4_avx512vnni(const MatmulCall& call) {
  for_each_tile<VnniW4<Zmm, 12>>(call);
}

void matmul_a8_t4_12x32x4_avx512vnni(const MatmulCall& call) {
  for_each_tile<VnniT4<Zmm, 12>>(call);
}

// Rounds in the default mode, ties to even; comparing with itself finds NaN.
void quantize_avx512(const float* x, int n, float inverse_step, int low, int high, int8_t* codes) {
  const __m512 inverse = _mm512_set1_ps(inverse_step);
  const __m512 bottom = _mm512_set1_ps(static_cast<float>(low));
  const __m512 top = _mm512_set1_ps(static_cast<float>(high));
  for (int i = 0; i < n; i += 16) {
    const __mmask16 present = n - i >= 16 ? 0xffff : static_cast<__mmask16>((1 << (n - i)) - 1);
    const __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(present, x + i), inverse);
    const __mmask16 number = _mm512_cmp_ps_mask(scaled, scaled, _CMP_ORD_Q);
    const __m512 clamped = _mm512_min_ps(_mm512_max_ps(scaled, bottom), top);
    const __m512i rounded = _mm512_maskz_cvtps_epi32(number, clamped);
    _mm512_mask_cvtepi32_storeu_epi8(codes + i, present, rounded);
  }
}

}  // namespace squat::kernels
