// Speed of every kernel of the table that this CPU runs, on one thread.
//
//   bench_kernels [part of a kernel's name]
//
// Prefill: 128 tokens. Decode: 1 token against as many matrices of the shape as make up 24 MiB,
// used in turn, as a model does, so that weights do not come from the nearest cache. Each figure is
// the best of several repetitions; the activations are prepared outside the clock (a model prepares
// them once for several matrices), which the last lines time by itself.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "kernels/kernels.h"

using namespace squat::kernels;

namespace {

using Clock = std::chrono::steady_clock;

// Seconds per call: the best of many batches of about 2 ms, short enough that some of them escape
// whatever else the machine is doing.
template <class Body>
double best_seconds(Body body) {
  int next = 0;
  const auto timed = [&](int calls) {
    const auto start = Clock::now();
    for (int i = 0; i < calls; ++i) body(next++);
    return std::chrono::duration<double>(Clock::now() - start).count();
  };
  timed(1);
  const int calls = std::max(1, static_cast<int>(0.002 / std::max(timed(1), 1e-8)));
  double best = timed(calls);
  for (int round = 0; round < 100; ++round) best = std::min(best, timed(calls));
  return best / calls;
}

std::vector<int8_t> some_codes(size_t count, int bits) {
  std::vector<int8_t> codes(count);
  uint32_t state = 1;
  for (int8_t& code : codes) {
    state = state * 1664525u + 1013904223u;
    code = static_cast<int8_t>(static_cast<int>(state >> 24) % (1 << bits) - (1 << (bits - 1)));
  }
  return codes;
}

constexpr int8_t kLevels[16] = {-128, -100, -77, -58, -42, -28, -16, -5,
                                5,    16,   28,  42,  58,  77,  100, 127};

const int8_t* levels_for(WeightForm weights) {
  return weights == WeightForm::t4 ? kLevels : nullptr;
}

struct Aligned {
  explicit Aligned(size_t size) : bytes(size + kAlignment) {}
  uint8_t* data() {
    const uintptr_t at = reinterpret_cast<uintptr_t>(bytes.data());
    return bytes.data() + (kAlignment - at % kAlignment) % kAlignment;
  }
  std::vector<uint8_t> bytes;
};

// Billions of multiply-accumulates per second for m tokens x (n x k) weights.
double speed(const Kernel& kernel, int m, int n, int k, size_t working_set) {
  const Choice choice = choice_of(kernel);
  const size_t size = packed_bytes(choice, kernel.weights, n, k);
  const int copies = static_cast<int>(std::max<size_t>(1, working_set / size));
  const std::vector<int8_t> codes = some_codes(size_t(n) * k, bits_of(kernel.weights));
  Aligned memory(size * copies);
  std::vector<PackedMatrix> matrices;
  for (int i = 0; i < copies; ++i) {
    matrices.push_back(packed_matrix(choice, kernel.weights, n, k, memory.data() + size * i,
                                     levels_for(kernel.weights)));
  }
  for (int row = 0; row < n; ++row) pack_row(matrices[0], row, codes.data() + size_t(row) * k);
  for (int i = 1; i < copies; ++i) std::memcpy(matrices[i].data, matrices[0].data, size);

  const std::vector<int8_t> a = some_codes(size_t(m) * k, kernel.activation_bits);
  ActivationRows rows;
  rows.codes = a.data();
  rows.stride = k;
  rows.rows = m;
  rows.inner = k;
  const std::vector<float> row_steps(m, 0.5f), steps(n, 0.5f);
  rows.steps = row_steps.data();
  Aligned scratch(prepared_bytes(choice, m, k));
  const Prepared prepared = prepare(choice, kernel.weights, rows, scratch.data());
  std::vector<float> out(size_t(m) * n);
  const double seconds = best_seconds([&](int call) {
    matmul(prepared, matrices[call % copies], Output::scaled(out.data(), n, steps.data()));
  });
  return double(m) * n * k / seconds * 1e-9;
}

double prepare_microseconds(const Choice& choice, int m, int k) {
  const std::vector<int8_t> a = some_codes(size_t(m) * k, 8);
  ActivationRows rows;
  rows.codes = a.data();
  rows.stride = k;
  rows.rows = m;
  rows.inner = k;
  Aligned scratch(prepared_bytes(choice, m, k));
  return 1e6 * best_seconds([&](int) { prepare(choice, WeightForm::w4, rows, scratch.data()); });
}

double quantize_microseconds(const Choice& choice, int n) {
  std::vector<float> x(n);
  for (int i = 0; i < n; ++i) x[i] = 0.01f * (i % 500 - 250);
  std::vector<int8_t> codes(n);
  return 1e6 * best_seconds([&](int) { quantize(choice, x.data(), n, 0.02f, 8, codes.data()); });
}

// Nanoseconds to append one token to the keys and values of one head, over 1024 tokens.
double append_nanoseconds(const Choice& choice, WeightForm form, int head_dim) {
  constexpr int kTokens = 1024;
  const std::vector<int8_t> codes = some_codes(head_dim, bits_of(form));
  const int8_t* levels = levels_for(form);
  Aligned key_data(KeyPool::bytes(choice, form, head_dim, kTokens));
  Aligned value_data(ValuePool::bytes(choice, form, head_dim, kTokens));
  return 1e9 / kTokens * best_seconds([&](int) {
           KeyPool keys = KeyPool::empty(choice, form, head_dim, key_data.data(), levels);
           ValuePool values =
               ValuePool::empty(choice, form, head_dim, kTokens, value_data.data(), levels);
           for (int t = 0; t < kTokens; ++t) {
             keys.append(codes.data());
             values.append(codes.data());
           }
         });
}

// Microseconds of one head's attention products, a token against 2048 cached ones.
double attention_microseconds(const Choice& choice, WeightForm form, int head_dim) {
  constexpr int kTokens = 2048;
  const std::vector<int8_t> codes = some_codes(head_dim, bits_of(form));
  const int8_t* levels = levels_for(form);
  Aligned key_data(KeyPool::bytes(choice, form, head_dim, kTokens));
  Aligned value_data(ValuePool::bytes(choice, form, head_dim, kTokens));
  KeyPool keys = KeyPool::empty(choice, form, head_dim, key_data.data(), levels);
  ValuePool values = ValuePool::empty(choice, form, head_dim, kTokens, value_data.data(), levels);
  for (int t = 0; t < kTokens; ++t) {
    keys.append(codes.data());
    values.append(codes.data());
  }
  ActivationRows query;
  query.codes = codes.data();
  query.stride = head_dim;
  query.rows = 1;
  query.inner = head_dim;
  const std::vector<uint8_t> weights(kTokens, 1);
  const ProbabilityRows probabilities{weights.data(), weights.size(), 1, kTokens};
  Aligned scratch(prepared_bytes(choice, 1, std::max(head_dim, kTokens)));
  std::vector<int32_t> score(kTokens), out(head_dim);
  return 1e6 * best_seconds([&](int) {
           scores(prepare(choice, form, query, scratch.data()), keys, score.data(), kTokens);
           weighted_values(choice, probabilities, values, scratch.data(), out.data(), head_dim);
         });
}

}  // namespace

int main(int argc, char** argv) {
  const std::string filter = argc > 1 ? argv[1] : "";
  constexpr int kShapes[][2] = {{512, 512}, {1024, 512}, {512, 1024}};  // rows x inner
  constexpr size_t kWorkingSet = 24u << 20;

  std::printf("%-36s %23s   %23s   %s\n", "", "prefill, GMAC/s (M=128)", "decode, GMAC/s (M=1)",
              "decode, GB/s of weights");
  std::printf("%-36s", "N x K");
  for (int table = 0; table < 3; ++table) {
    for (const auto& shape : kShapes) std::printf(" %3dx%-4d", shape[0], shape[1]);
    std::printf(" ");
  }
  std::printf("\n");
  for (const Kernel& kernel : table()) {
    if (!runs_here(*find_isa(kernel.isa))) continue;
    if (std::string(kernel.name).find(filter) == std::string::npos) continue;
    std::printf("%-36s", kernel.name);
    for (const auto& shape : kShapes) {
      std::printf(" %8.1f", speed(kernel, 128, shape[0], shape[1], 0));
      std::fflush(stdout);
    }
    std::printf(" ");
    double decode[3];
    for (int i = 0; i < 3; ++i) {
      decode[i] = speed(kernel, 1, kShapes[i][0], kShapes[i][1], kWorkingSet);
      std::printf(" %8.1f", decode[i]);
      std::fflush(stdout);
    }
    std::printf(" ");
    for (double gmacs : decode) std::printf(" %8.1f", gmacs * bits_of(kernel.weights) / 8);
    std::printf("\n");
  }

  std::printf("\n%-12s %16s %16s %16s", "", "prepare 128x512", "prepare 1x512", "quantize 512");
  for (const WeightForm form : kWeightForms) std::printf("   append %s d=64", name_of(form));
  for (const WeightForm form : kWeightForms) std::printf("   attend %s 2048", name_of(form));
  std::printf("\n");
  for (const Isa& isa : isas()) {
    Choice choice;
    std::string error;
    if (!choose(isa.name, &choice, &error)) continue;
    std::printf("%-12s %13.2f us %13.3f us %13.3f us", isa.name,
                prepare_microseconds(choice, 128, 512), prepare_microseconds(choice, 1, 512),
                quantize_microseconds(choice, 512));
    for (const WeightForm form : kWeightForms) {
      std::printf(" %13.1f ns", append_nanoseconds(choice, form, 64));
    }
    for (const WeightForm form : kWeightForms) {
      std::printf(" %13.2f us", attention_microseconds(choice, form, 64));
    }
    std::printf("\n");
  }
  return 0;
}
