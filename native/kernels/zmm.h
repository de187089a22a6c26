// The vectors of AVX-512 with VNNI, as vnni.h wants them.
#pragma once

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
}  // namespace squat::kernels
