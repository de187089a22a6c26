// The same bits on every platform: what follows was computed once, on x86 (with AVX512-VNNI, the
// last four with AVX2). In an emulator it is whole models on every CPU, in seconds.
#include <cstdio>
#include <vector>

#include "api/engine.h"
#include "check.h"
#include "model_file.h"
#include "squat.h"

namespace {

using squat::Engine;
using squat::test::Bytes;
using squat::test::has_recent_keys;
using squat::test::kVocabulary;
using squat::test::Logits;
using squat::test::ModelOptions;
using squat::test::random_tokens;
using squat::test::tiny_model;
using squat::test::variants;

void check_hash(const Bytes& file, uint64_t expected) {
  Engine engine(file.data(), file.size(), "model", 1, 0);
  const std::vector<int32_t> tokens = random_tokens(75);
  Logits logits(tokens.size() * kVocabulary);
  engine.session().eval(tokens.data(), tokens.size(), tokens.size(), logits.data());
  const uint64_t hash = squat_hash_logits(logits.data(), logits.size());
  if (!CHECK(hash == expected)) {
    std::fprintf(stderr, "  %016llx\n", static_cast<unsigned long long>(hash));
  }
}

void test_bits() {
  struct Case {
    bool gpt2;
    uint32_t version;
    bool features;
    uint64_t hash;
  };
  for (const auto& [gpt2, version, features, expected] :
       {Case{false, 1, false, 0x8c0da9a767ae2306u}, Case{true, 1, false, 0x2afaf405b8e88a76u},
        Case{false, 2, false, 0x8c0da9a767ae2306u}, Case{true, 2, false, 0x2afaf405b8e88a76u},
        Case{false, 2, true, 0x8ae9de13778a6791u}, Case{true, 2, true, 0xf2e89017cb23e91cu}}) {
    ModelOptions options;
    options.gpt2 = gpt2;
    options.version = version;
    options.row_steps = options.exponents = options.hadamard = options.levels = features;
    check_hash(tiny_model(options).bytes(), expected);
  }
  // With everything that a file may have, in each width of tokens, 4:8 by attention and by rarity.
  const uint64_t last[] = {0xc6ec964e0c9e43c6u, 0x6987f8aed4b08b85u, 0x84ca407a5c2149bfu,
                           0xb6e830edb6f3e872u};
  // With recent keys of 4 bits seen in 8.
  const uint64_t recent[] = {0xd636d4ac74db3c6du, 0x1646495428477eb0u, 0x55ab0984e4b749d5u,
                             0xaa019d35f38e0ff5u};
  const uint64_t *of_last = last, *of_recent = recent;
  for (const ModelOptions& options : variants()) {
    if (options.convolutions) check_hash(tiny_model(options).bytes(), *of_last++);
    if (has_recent_keys(options)) check_hash(tiny_model(options).bytes(), *of_recent++);
  }
}

}  // namespace

int main() {
  test_bits();
  return squat::test::report("test_bits");
}
