// libFuzzer target: whatever the bytes are, loading them as a model either succeeds or throws
// Error, and a model that loads evaluates and tokenizes. test_gguf.cpp runs it on damaged files as
// well.
#include <cstddef>
#include <cstdint>
#include <new>

#include "api/engine.h"
#include "base/error.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    squat::Engine engine(data, size, "fuzz.gguf", 1, 1);
    const int32_t token = 0;
    std::vector<float> logits(static_cast<size_t>(engine.model().n_vocab));
    engine.session().eval(&token, 1, 1, logits.data());
    const std::vector<int32_t> ids = engine.tokenizer().encode("It's  99 caf\xc3\xa9s.\n");
    engine.tokenizer().decode(ids.data(), ids.size());
  } catch (const squat::Error&) {
  } catch (const std::bad_alloc&) {
  }
  return 0;
}
