// Several sequences in one step: whoever else is in it, however many tokens each has and in what
// order they come, a text's logits are the ones that it has alone, and so is what is saved of it.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <memory>
#include <string>
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
using squat::test::isas_to_compare;
using squat::test::kVocabulary;
using squat::test::Logits;
using squat::test::ModelOptions;
using squat::test::random_tokens;
using squat::test::tiny_model;
using squat::test::variants;
using squat::test::windowed;
using squat::test::windowed_file;

using Tokens = std::vector<int32_t>;

// Equal numbers every time, below a limit.
struct Random {
  uint32_t state = 1;
  size_t below(size_t limit) {
    state = state * 1664525 + 1013904223;
    return (state >> 8) % limit;
  }
};

// A text, and what its tokens have for logits alone.
struct Text {
  Tokens tokens;
  Logits logits;
  Bytes saved;
  size_t done = 0;

  Text(Engine& engine, size_t length, size_t skip) {
    const Tokens all = random_tokens(length + skip);
    tokens.assign(all.begin() + static_cast<std::ptrdiff_t>(skip), all.end());
    logits.resize(length * kVocabulary);
    engine.session().rewind(0);
    engine.session().eval(tokens.data(), length, length, logits.data());
    saved = engine.session().save(engine.identity());
  }
  const float* after(size_t count) const { return logits.data() + (count - 1) * kVocabulary; }
};

// All texts to their ends, some of them in each step, in any order. What a layer with a window has
// dropped depends on the pieces that its text came in; `drops` says that there is such a layer.
void check_company(const Bytes& file, const std::vector<size_t>& lengths, uint32_t threads,
                   size_t most_tokens, bool drops = false) {
  Engine alone(file.data(), file.size(), "model", 1, 0);
  Engine first(file.data(), file.size(), "model", threads, 0);
  std::vector<std::unique_ptr<Engine>> engines;
  std::vector<Text> texts;
  for (size_t i = 0; i < lengths.size(); i++) {
    texts.emplace_back(alone, lengths[i], 3 * i);
    // Contexts of their own, that of the first one apart, which computes.
    engines.push_back(std::make_unique<Engine>(first, 1, static_cast<uint32_t>(lengths[i])));
  }
  Random random;
  const auto unfinished = [&] {
    return std::any_of(texts.begin(), texts.end(),
                       [](const Text& text) { return text.done < text.tokens.size(); });
  };
  while (unfinished()) {
    std::vector<size_t> order;
    for (size_t i = 0; i < texts.size(); i++) {
      if (texts[i].done < texts[i].tokens.size() && random.below(4) > 0) order.push_back(i);
    }
    if (order.empty()) continue;
    std::rotate(order.begin(), order.begin() + static_cast<int>(random.below(order.size())),
                order.end());
    std::vector<Session::Turn> turns;
    for (const size_t i : order) {
      Text& text = texts[i];
      const size_t wish = random.below(3) > 0 ? 1 : 1 + random.below(most_tokens);
      const size_t n = std::min(wish, text.tokens.size() - text.done);
      turns.push_back({&engines[i]->session(), text.tokens.data() + text.done, n});
      text.done += n;
    }
    Logits logits(turns.size() * kVocabulary);
    first.session().step(turns.data(), turns.size(), logits.data());
    bool equal = true;
    for (size_t t = 0; t < order.size(); t++) {
      const Text& text = texts[order[t]];
      equal = equal && std::memcmp(logits.data() + t * kVocabulary, text.after(text.done),
                                   kVocabulary * sizeof(float)) == 0;
    }
    CHECK(equal);
  }
  for (size_t i = 0; i < texts.size(); i++) {
    CHECK(drops || engines[i]->session().save(alone.identity()) == texts[i].saved);
    CHECK(engines[i]->session().token_count() == texts[i].tokens.size());
  }
  CHECK(first.session().length() == 0);
}

void test_company() {
  for (const ModelOptions& options : variants()) {
    const Bytes file = tiny_model(options).bytes();
    check_company(file, {75, 1, 40, 64, 33, 75}, 1, 30);
    check_company(file, {75, 20, 75}, 4, 75);  // heads are shared among threads
    for (const squat::kernels::Isa& isa : isas_to_compare()) {
      setenv("SQUAT_ISA", isa.name, 1);
      check_company(file, {30, 9, 17}, 1, 12);
      unsetenv("SQUAT_ISA");
    }
  }
}

// More tokens than one pass takes, and layers that drop what they no longer see.
void test_long_turns() {
  for (const ModelOptions& options : windowed()) {
    check_company(windowed_file(options), {800, 300, 555}, 4, 400, true);
  }
}

// The engine that computes may have a turn of its own, and goes on alone afterwards.
void test_the_first_takes_part() {
  const Bytes file = tiny_model().bytes();
  Engine first(file.data(), file.size(), "model", 1, 0), other(first, 1, 0);
  const Text text(first, 40, 0);
  first.session().rewind(0);
  Logits logits(2 * kVocabulary), rest(20 * kVocabulary);
  const Session::Turn turns[] = {{&first.session(), text.tokens.data(), 20},
                                 {&other.session(), text.tokens.data(), 7}};
  first.session().step(turns, 2, logits.data());
  CHECK(std::memcmp(logits.data(), text.after(20), kVocabulary * sizeof(float)) == 0);
  CHECK(std::memcmp(logits.data() + kVocabulary, text.after(7), kVocabulary * sizeof(float)) == 0);
  first.session().eval(text.tokens.data() + 20, 20, 20, rest.data());
  CHECK(std::equal(rest.begin(), rest.end(), text.logits.begin() + 20 * kVocabulary));
}

// By the C interface: what is refused leaves every session as it was.
void test_refusals() {
  const std::string path = "test_step.gguf";
  const Bytes file = tiny_model().bytes();
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(file.data()), static_cast<std::streamsize>(file.size()));
  squat_engine *first = nullptr, *second = nullptr, *wide = nullptr, *foreign = nullptr;
  CHECK(squat_load(path.c_str(), 1, 30, &first) == SQUAT_OK);
  CHECK(squat_share(first, 1, 30, &second) == SQUAT_OK);
  CHECK(squat_share(first, 1, 31, &wide) == SQUAT_OK);
  CHECK(squat_load(path.c_str(), 1, 30, &foreign) == SQUAT_OK);
  const Tokens tokens = random_tokens(32), unknown = {3, kVocabulary};
  Logits logits(2 * kVocabulary);
  const auto refused = [&](const std::vector<squat_turn>& turns, const char* why,
                           size_t capacity = 2 * kVocabulary,
                           squat_status expected = SQUAT_ERROR_ARGUMENT) {
    const bool status =
        squat_step(first, turns.data(), turns.size(), logits.data(), capacity) == expected;
    const bool said = std::strstr(squat_last_error(), why) != nullptr;
    if (!said) std::fprintf(stderr, "  %s\n", squat_last_error());
    return status && said && squat_length(first) == 0 && squat_length(second) == 0;
  };
  const int32_t* ids = tokens.data();
  CHECK(refused({}, "turns: there are none"));
  CHECK(refused({{first, ids, 3}, {nullptr, ids, 3}}, "turn 1: engine: is NULL"));
  CHECK(refused({{first, ids, 3}, {second, nullptr, 3}}, "turn 1: tokens: there are none"));
  CHECK(refused({{first, ids, 0}, {second, ids, 3}}, "turn 0: tokens: there are none"));
  CHECK(refused({{first, ids, 3}, {foreign, ids, 3}}, "turn 1: engine: has another model"));
  CHECK(refused({{second, ids, 3}, {wide, ids, 3}}, "turn 1: engine: its context of 31"));
  CHECK(refused({{first, ids, 3}, {second, ids, 3}, {first, ids, 3}}, "comes twice",
                3 * kVocabulary));
  CHECK(refused({{first, ids, 3}, {second, ids, 3}}, "logits: capacity", 2 * kVocabulary - 1));
  CHECK(refused({{first, ids, 3}, {second, unknown.data(), 2}}, "turn 1: tokens: element 1 is"));
  CHECK(refused({{first, ids, 3}, {second, ids, 31}}, "turn 1: tokens: 31 after the 0",
                2 * kVocabulary, SQUAT_ERROR_CONTEXT));
  const squat_turn turns[] = {{first, ids, 30}, {second, ids, 3}};
  CHECK(squat_step(wide, turns, 2, logits.data(), logits.size()) == SQUAT_OK);
  CHECK(squat_length(first) == 30 && squat_length(second) == 3 && squat_length(wide) == 0);
  CHECK(squat_step(nullptr, turns, 2, logits.data(), logits.size()) == SQUAT_ERROR_ARGUMENT);
  for (squat_engine* engine : {first, second, wide, foreign}) squat_free(engine);
  std::remove(path.c_str());
}

}  // namespace

int main() {
  test_company();
  test_long_turns();
  test_the_first_takes_part();
  test_refusals();
  return squat::test::report("test_step");
}
