// libFuzzer target: whatever the bytes are, loading them as a model either succeeds or throws
// Error, and with a model that loads everything works that a user would do: it reads a text, writes
// four tokens, saves the session and takes it back. test_gguf.cpp runs it on damaged files as well.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>
#include <string>
#include <vector>

#include "api/engine.h"
#include "base/error.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  constexpr uint32_t kContext = 12;
  try {
    squat::Engine engine(data, size, "fuzz.gguf", 1, kContext);
    squat::Session& session = engine.session();
    std::vector<int32_t> ids = engine.tokenizer().encode("It's  99 caf\xc3\xa9s.\n");
    engine.tokenizer().decode(ids.data(), ids.size());

    const size_t context = static_cast<size_t>(session.context());
    ids.resize(std::min<size_t>({ids.size(), 6, context}));
    if (ids.empty()) ids.push_back(0);
    std::vector<float> logits(engine.model().n_vocab);
    session.eval(ids.data(), ids.size(), 1, logits.data());
    for (int i = 0; i < 4 && static_cast<size_t>(session.length()) < context; i++) {
      const auto best = std::max_element(logits.begin(), logits.end()) - logits.begin();
      const int32_t token = static_cast<int32_t>(best);
      session.eval(&token, 1, 1, logits.data());
    }
    const std::vector<uint8_t> saved = session.save(engine.identity());
    session.rewind(0);
    session.restore(saved, engine.identity(), "saved");
  } catch (const squat::Error&) {
  } catch (const std::bad_alloc&) {
  }
  return 0;
}
