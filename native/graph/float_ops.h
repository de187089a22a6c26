// The float32 part of the network: norms, softmax, activation functions, rotation, residual.
//
// Each function works on one row. Its arithmetic is fixed (docs/format.md, "Numbers"): float32
// without fused multiply-add, sums in float64 in a fixed order, an exponential function of our own.
// So a row's result depends on that row alone, not on the rows around it, and is the same on every
// CPU. A padded row has room for a multiple of 16 elements; what lies behind its n may be
// overwritten.
#pragma once

#include <cstdint>

namespace squat {

// The sixteen values of 4-bit codes, ascending, and where they part: a code above threshold i
// belongs to level i + 1 or a higher one.
struct Levels {
  int8_t values[16];
  int8_t thresholds[15];
};

// `values` ascend, from -128 to 127. Halfway between two is still the lower one.
Levels make_levels(const int32_t values[16]);

// A row of probabilities as codes: what these are multiplied by, and the probability of key
// `first`.
struct CodedRow {
  float step, first;
};

struct FloatOps {
  // out = weight * (x / sqrt(mean(x^2) + epsilon)); out may be x.
  void (*rms_norm)(const float* x, const float* weight, float epsilon, int n, float* out);
  // out = (x - mean) / sqrt(variance + epsilon) * weight + bias; out may be x.
  void (*layer_norm)(const float* x, const float* weight, const float* bias, float epsilon, int n,
                     float* out);
  // p = exp(x - max) / sum(exp(x - max)) in place of x; returns p[first]. The row is padded, and
  // up to a whole vector zero afterwards.
  float (*softmax)(float* x, int n, int first);
  // What bytes stand for (token_steps.h), of padded rows.
  void (*decode_multipliers)(const int8_t* quarters, int n, float* multipliers);
  // x *= multipliers, both of them padded; returns the largest. A NaN counts as zero.
  float (*weigh)(const float* multipliers, int n, float* x);
  // codes = rint(x * inverse_step), 0 .. 255, of padded rows. NaN becomes 0.
  void (*unsigned_codes)(const float* x, int n, float inverse_step, uint8_t* codes);
  // Softmax in base 2 (docs/format.md), which makes codes: of 2^(x - max) * multipliers, or of
  // 2^(x - max) where that is null. All rows are padded; x is overwritten.
  CodedRow (*softmax_codes)(float* x, int n, int first, const float* multipliers, uint8_t* codes);
  // log(sum(exp(x))).
  double (*log_sum_exp)(const float* x, int n);
  // Activation functions: out = f(x) * up, or f(x) where up is null; out may be x or up.
  // x / (1 + exp(-x)),
  void (*silu)(const float* x, const float* up, int n, float* out);
  // x / (1 + exp(-2 sqrt(2/pi) (x + 0.044715 x^3))), the tanh form of GELU ("gelu_new"),
  void (*gelu_tanh)(const float* x, const float* up, int n, float* out);
  // x (1 - erfc(x / sqrt(2)) / 2).
  void (*gelu)(const float* x, const float* up, int n, float* out);
  // Transforms each block of x (docs/format.md): the power of two in it by a Hadamard matrix, times
  // `scale`, from the distance `inner` on; what is odd by reflections. `block` divides n.
  void (*hadamard)(float* x, int n, int block, int inner, float scale);
  // The largest |x|; a NaN counts as zero.
  float (*largest)(const float* x, int n);
  // Each code becomes the level next to it,
  void (*to_levels)(const Levels& levels, int n, int8_t* codes);
  // or the 4-bit code that stands for that level: its place among the sixteen, less 8.
  void (*to_level_codes)(const Levels& levels, int n, int8_t* codes);
  // The square of the largest |x| over the mean of x^2: a token's importance by its value.
  float (*value_peak)(const float* x, int n);
  // y += x.
  void (*add)(const float* x, int n, float* y);
  // Rotates the pairs (x[2i], x[2i+1]) of n elements by angles: x[j] * cosine[j] + x[j ^ 1] *
  // sine[j]. Both of a pair have the cosine, the first minus the sine, the second the sine.
  void (*rotate)(const float* cosine, const float* sine, int n, float* x);
  // out = float(x) * (step * multipliers) * scaling; all rows are padded. Null: multipliers are 1.
  void (*scale_scores)(const int32_t* x, float step, const float* multipliers, float scaling, int n,
                       float* out);
  // The same for sums that stand in two rows: out[i] is the next of `wide` where widths[i] is 8,
  // the next of `narrow` elsewhere, with the step of its width. All rows are padded.
  void (*merge_scores)(const uint8_t* widths, const int32_t* wide, float step8,
                       const int32_t* narrow, float step4, const float* multipliers, float scaling,
                       int n, float* out);
  // The other way: codes whose width is 8 one after the other in `wide`, the others in `narrow`.
  // All rows are padded.
  void (*split_codes)(const uint8_t* widths, const uint8_t* codes, int n, uint8_t* wide,
                      uint8_t* narrow);
  // out = step_p * (step8 * wide + step4 * narrow), rounded once; a null sum counts as zero.
  void (*combine_values)(const int32_t* wide, float step8, const int32_t* narrow, float step4,
                         float step_p, int n, float* out);
};

// The implementation for an instruction set that needs these features (a mask of CpuFeature).
const FloatOps& float_ops(uint32_t features);

}  // namespace squat
