// Engines that share a model: many threads at once, each with a session of its own, say what a
// single one says, whatever else happens to their sessions in between.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "api/engine.h"
#include "base/error.h"
#include "check.h"
#include "model_file.h"
#include "squat.h"

namespace {

using squat::Engine;
using squat::Error;
using squat::Session;
using squat::test::Bytes;
using squat::test::kVocabulary;
using squat::test::Logits;
using squat::test::ModelOptions;
using squat::test::random_tokens;
using squat::test::tiny_model;

constexpr int kThreads = 8, kGenerations = 2000, kPrompts = 25;
constexpr size_t kNew = 6;

using Tokens = std::vector<int32_t>;

Tokens prompt(int which) {
  Tokens all = random_tokens(8 + static_cast<size_t>(which));
  return {all.begin() + which % 7, all.end()};
}

// The most probable tokens after a prompt.
Tokens answer(Session& session, const Tokens& prompt, size_t count) {
  session.rewind(0);
  Logits logits(kVocabulary);
  session.eval(prompt.data(), prompt.size(), 1, logits.data());
  Tokens out;
  while (out.size() < count) {
    out.push_back(
        static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin()));
    session.eval(&out.back(), 1, 1, logits.data());
  }
  return out;
}

bool refused(Session& session, const Tokens& tokens) {
  const int before = session.length();
  try {
    session.eval(tokens.data(), tokens.size(), 0, nullptr);
  } catch (const Error&) {
    return session.length() == before;
  }
  return false;
}

void test_many_threads(const ModelOptions& options) {
  const Bytes file = tiny_model(options).bytes();
  Engine first(file.data(), file.size(), "model", 1, 0);
  std::vector<Tokens> expected;
  for (int i = 0; i < kPrompts; i++) expected.push_back(answer(first.session(), prompt(i), kNew));
  std::atomic<int> next{0}, wrong{0};
  const auto work = [&](uint32_t threads) {
    Engine engine(first, threads, 0);
    Session& session = engine.session();
    const Tokens longest = random_tokens(static_cast<size_t>(session.context()));
    const Tokens unknown = {3, kVocabulary};
    for (int i = next++; i < kGenerations; i = next++) {
      const Tokens asked = prompt(i % kPrompts);
      if (i % 5 == 0) answer(session, asked, kNew / 2);  // given up in the middle
      if (i % 11 == 0) wrong += !refused(session, unknown);
      if (i % 97 == 0) {
        session.rewind(0);
        session.eval(longest.data(), longest.size(), 0, nullptr);
        wrong += !refused(session, {1});
      }
      if (i % 13 == 0) {  // what threads of all engines make at the first call
        const Tokens ids = engine.tokenizer().encode("the cafe");
        wrong += engine.tokenizer().decode(ids.data(), ids.size()) != "the cafe";
        session.restore(session.save(engine.identity()), first.identity(), "it");
      }
      wrong += answer(session, asked, kNew) != expected[static_cast<size_t>(i % kPrompts)];
    }
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; i++) threads.emplace_back(work, i % 4 == 0 ? 2 : 1);
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == 0);
  CHECK(answer(first.session(), prompt(3), kNew) == expected[3]);
}

// By the C interface: the first engine is freed before the others, and another context is its own.
void test_the_first_may_go() {
  const std::string path = "test_shared.gguf";
  const Bytes file = tiny_model().bytes();
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(file.data()), static_cast<std::streamsize>(file.size()));
  squat_engine *first = nullptr, *second = nullptr, *third = nullptr;
  CHECK(squat_load(path.c_str(), 1, 0, &first) == SQUAT_OK);
  CHECK(squat_share(first, 1, 16, &second) == SQUAT_OK);
  const Tokens tokens = random_tokens(16);
  Logits expected(kVocabulary), found(kVocabulary);
  CHECK(squat_eval(first, tokens.data(), 16, SQUAT_LOGITS_LAST, expected.data(), kVocabulary) ==
        SQUAT_OK);
  CHECK(squat_length(second) == 0);
  squat_free(first);
  CHECK(squat_share(second, 2, 0, &third) == SQUAT_OK);
  CHECK(squat_eval(second, tokens.data(), 16, SQUAT_LOGITS_LAST, found.data(), kVocabulary) ==
        SQUAT_OK);
  CHECK(found == expected);
  CHECK(squat_eval(second, tokens.data(), 1, SQUAT_LOGITS_NONE, nullptr, 0) == SQUAT_ERROR_CONTEXT);
  CHECK(squat_eval(third, tokens.data(), 16, SQUAT_LOGITS_LAST, found.data(), kVocabulary) ==
        SQUAT_OK);
  CHECK(found == expected);
  squat_info info;
  CHECK(squat_get_info(second, &info) == SQUAT_OK && info.n_context == 16);
  CHECK(squat_share(second, 1, 1u << 30, &first) == SQUAT_ERROR_ARGUMENT);
  CHECK(squat_share(nullptr, 1, 0, &first) == SQUAT_ERROR_ARGUMENT);
  CHECK(squat_share(second, 1, 0, nullptr) == SQUAT_ERROR_ARGUMENT);
  squat_free(second);
  squat_free(third);
  std::remove(path.c_str());
}

}  // namespace

int main() {
  ModelOptions options;
  options.activations = "4:8";
  test_many_threads(options);
  test_the_first_may_go();
  return squat::test::report("test_shared");
}
