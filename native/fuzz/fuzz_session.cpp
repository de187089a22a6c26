// libFuzzer target: whatever the bytes are, a session takes them for a saved one of its model, and
// goes on for four tokens, or throws Error and stays as it was. The hash at the end is put right
// first, as a stranger would: it is there against damage, not against anybody.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "api/engine.h"
#include "base/error.h"
#include "base/hash.h"
#include "small_models.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using squat::test::session_models;
  static const std::vector<std::vector<uint8_t>> files = session_models();
  static std::vector<std::unique_ptr<squat::Engine>> engines;
  if (engines.empty()) {
    for (const auto& file : files) {
      engines.push_back(
          std::make_unique<squat::Engine>(file.data(), file.size(), "fuzz.gguf", 1, 0));
    }
  }
  if (size < 1 + sizeof(uint64_t)) return 0;
  squat::Engine& engine = *engines[data[0] % engines.size()];
  squat::Session& session = engine.session();
  std::vector<uint8_t> bytes(data + 1, data + size);
  const size_t end = bytes.size() - sizeof(uint64_t);
  const uint64_t hash = squat::hash64(bytes.data(), end);
  std::memcpy(bytes.data() + end, &hash, sizeof hash);

  const int32_t tokens[] = {5, 6, 7, 8};
  session.rewind(0);
  session.eval(tokens, 2, 0, nullptr);
  try {
    session.restore(bytes, engine.identity(), "fuzz.session");
  } catch (const squat::Error&) {
    if (session.length() != 2) std::abort();
    return 0;
  }
  if (session.length() + 4 > session.context()) return 0;
  std::vector<float> logits(engine.model().n_vocab);
  session.eval(tokens, 4, 1, logits.data());
  return 0;
}
