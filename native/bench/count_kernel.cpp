// One product, or a row of floats, a given number of times: what a program that counts instructions
// is pointed at.
//
//   count_kernel NAME CALLS         of a kernel or a row, or plain_smlal or plain_sdot
//   count_kernel list               the names of the kernels
//   count_kernel rows               those of the rows
//
// The difference between two numbers of calls is the work of the product alone, its write-back
// included. The plain loops are what one writes first: one sum for each token and weight row,
// sixteen 8-bit codes at a time.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "base/cpu.h"
#include "graph/float_ops.h"
#include "kernels/kernels.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

using namespace squat::kernels;

namespace {

constexpr int kTokens = 16, kRows = 32, kInner = 512;

int8_t activations[kTokens * kInner];
int8_t weights[kRows * kInner];
float out[kTokens * kRows];

#if defined(__aarch64__)
#define SQUAT_PLAIN(NAME, TARGET, BODY)                                  \
  TARGET __attribute__((noinline)) void NAME() {                         \
    for (int m = 0; m < kTokens; ++m) {                                  \
      for (int n = 0; n < kRows; ++n) {                                  \
        int32x4_t sum = vdupq_n_s32(0);                                  \
        for (int k = 0; k < kInner; k += 16) {                           \
          const int8x16_t a = vld1q_s8(activations + m * kInner + k);    \
          const int8x16_t w = vld1q_s8(weights + n * kInner + k);        \
          BODY;                                                          \
        }                                                                \
        out[m * kRows + n] = 0.5f * static_cast<float>(vaddvq_s32(sum)); \
      }                                                                  \
    }                                                                    \
  }
SQUAT_PLAIN(plain_sdot, __attribute__((target("arch=armv8.2-a+dotprod"))),
            sum = vdotq_s32(sum, a, w))
SQUAT_PLAIN(plain_smlal, , {
  const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(w));
  const int16x8_t high = vmull_high_s8(a, w);
  sum = vpadalq_s16(vpadalq_s16(sum, low), high);
})
#endif

constexpr int8_t kLevels[16] = {-128, -100, -77, -58, -42, -28, -16, -5,
                                5,    16,   28,  42,  58,  77,  100, 127};

const int8_t* levels_for(WeightForm weights) {
  return weights == WeightForm::t4 ? kLevels : nullptr;
}

void run_kernel(const Kernel& kernel, int calls) {
  const Choice choice = choice_of(kernel);
  std::vector<uint8_t> memory(packed_bytes(choice, kernel.weights, kRows, kInner) + 64);
  uint8_t* aligned = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
  const PackedMatrix matrix =
      packed_matrix(choice, kernel.weights, kRows, kInner, aligned, levels_for(kernel.weights));
  for (int row = 0; row < kRows; ++row) pack_row(matrix, row, weights + row * kInner);
  const std::vector<uint8_t> widths(kTokens, static_cast<uint8_t>(kernel.activation_bits));
  ActivationRows rows;
  rows.codes = activations;
  rows.stride = kInner;
  rows.rows = kTokens;
  rows.inner = kInner;
  rows.bits = widths.data();
  const std::vector<float> row_steps(kTokens, 0.5f), steps(kRows, 0.5f);
  rows.steps = row_steps.data();
  std::vector<uint8_t> scratch(prepared_bytes(choice, kTokens, kInner) + 64);
  const Prepared prepared = prepare(choice, kernel.weights, rows, scratch.data());
  const Output output = Output::scaled(out, kRows, steps.data());
  for (int i = 0; i < calls; ++i) matmul(prepared, matrix, output);
}

// Rows of as many elements as attention has keys at that length.
constexpr int kRow = 2048;
float x[kRow], y[kRow];
int32_t sums[kRow];
uint8_t codes[kRow];

struct Row {
  const char* name;
  void (*run)(const squat::FloatOps& ops);
};

const Row kFloatRows[] = {
    {"rms_norm", [](const squat::FloatOps& ops) { ops.rms_norm(x, y, 1e-5f, kRow, x); }},
    {"silu", [](const squat::FloatOps& ops) { ops.silu(x, y, kRow, x); }},
    {"rotate", [](const squat::FloatOps& ops) { ops.rotate(y, y, kRow, x); }},
    {"hadamard", [](const squat::FloatOps& ops) { ops.hadamard(x, kRow, kRow, 1, 0.03125f); }},
    {"largest", [](const squat::FloatOps& ops) { x[0] = ops.largest(x, kRow); }},
    {"to_levels",
     [](const squat::FloatOps& ops) {
       const int32_t levels[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                   1,    13,   25,  38,  53,  69,  89,  113};
       ops.to_levels(squat::make_levels(levels), kRow, reinterpret_cast<int8_t*>(codes));
     }},
    {"scale_scores",
     [](const squat::FloatOps& ops) { ops.scale_scores(sums, 0.5f, y, 0.125f, kRow, x); }},
    {"softmax_codes", [](const squat::FloatOps& ops) { ops.softmax_codes(x, kRow, 0, y, codes); }},
    {"softmax",
     [](const squat::FloatOps& ops) {
       ops.softmax(x, kRow, 0);
       ops.weigh(y, kRow, x);
       ops.unsigned_codes(x, kRow, 255.0f, codes);
     }},
};

}  // namespace

int main(int argc, char** argv) {
  const char* name = argc > 1 ? argv[1] : "list";
  const int calls = argc > 2 ? std::atoi(argv[2]) : 1;
  for (size_t i = 0; i < sizeof activations; ++i)
    activations[i] = static_cast<int8_t>(i * 7 % 16 - 8);
  for (size_t i = 0; i < sizeof weights; ++i) weights[i] = static_cast<int8_t>(i * 5 % 16 - 8);
#if defined(__aarch64__)
  if (std::strcmp(name, "plain_sdot") == 0 || std::strcmp(name, "plain_smlal") == 0) {
    for (int i = 0; i < calls; ++i)
      std::strcmp(name, "plain_sdot") == 0 ? plain_sdot() : plain_smlal();
    return 0;
  }
#endif
  for (int i = 0; i < kRow; ++i) x[i] = static_cast<float>(i * 7 % 64 - 32), y[i] = 1;
  for (const Row& row : kFloatRows) {
    if (std::strcmp(name, "rows") == 0) std::printf("%s\n", row.name);
    if (std::strcmp(name, row.name) != 0) continue;
    for (int i = 0; i < calls; ++i) row.run(squat::float_ops(squat::cpu_features()));
    return 0;
  }
  for (const Kernel& kernel : table()) {
    if (std::strcmp(name, "list") == 0) std::printf("%s\n", kernel.name);
    if (std::strcmp(name, kernel.name) != 0) continue;
    run_kernel(kernel, calls);
    return 0;
  }
  return std::strcmp(name, "list") == 0 || std::strcmp(name, "rows") == 0 ? 0 : 2;
}
