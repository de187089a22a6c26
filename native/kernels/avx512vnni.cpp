// AVX-512 with VNNI: tiles of 12 tokens x 32 weight rows, 24 of the 32 registers being sums.
#include "zmm.h"

namespace squat::kernels {

void matmul_a8_w8_12x32x4_avx512vnni(const MatmulCall& call) {
  for_each_tile<VnniW8<Zmm, 12, InBlocks>>(call);
}

void matmul_a8_w4_12x32x4_avx512vnni(const MatmulCall& call) {
  for_each_tile<VnniW4<Zmm, 12, InBlocks>>(call);
}

void matmul_a8_t4_12x32x4_avx512vnni(const MatmulCall& call) {
  for_each_tile<VnniT4<Zmm, 12, InBlocks>>(call);
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
