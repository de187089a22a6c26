// Saved sessions: what is loaded goes on as what was saved, on any instruction set; and whatever
// the bytes are, a session is either loaded or refused and left as it was.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "api/engine.h"
#include "base/error.h"
#include "base/hash.h"
#include "check.h"
#include "kernels/kernels.h"
#include "model_file.h"
#include "squat.h"

namespace {

using squat::Engine;
using squat::Session;
using squat::test::Bytes;
using squat::test::isas_to_compare;
using squat::test::kVocabulary;
using squat::test::Logits;
using squat::test::ModelOptions;
using squat::test::random_tokens;
using squat::test::same;
using squat::test::tiny_model;

Logits next_logits(Session& session, const std::vector<int32_t>& tokens, size_t begin) {
  Logits logits((tokens.size() - begin) * kVocabulary);
  session.eval(tokens.data() + begin, tokens.size() - begin, tokens.size() - begin, logits.data());
  return logits;
}

// Puts the hash right that a change has made wrong, as a stranger would.
void seal(Bytes* bytes) {
  const size_t end = bytes->size() - sizeof(uint64_t);
  const uint64_t hash = squat::hash64(bytes->data(), end);
  std::memcpy(bytes->data() + end, &hash, sizeof hash);
}

// Whether the bytes are refused, with this in the message; the session is then as it was.
bool refused(Engine& engine, const Bytes& bytes, const char* part) {
  const Bytes before = engine.session().save(0);
  try {
    engine.session().restore(bytes, engine.identity(), "it");
  } catch (const squat::Error& error) {
    const bool ok = std::strstr(error.what(), part) != nullptr;
    if (!ok) std::fprintf(stderr, "  %s\n", error.what());
    return ok && engine.session().save(0) == before;
  }
  return false;
}

void check_continues(const Bytes& file, size_t read, size_t rewound, size_t next) {
  const std::vector<int32_t> tokens = random_tokens(read + next);
  Engine engine(file.data(), file.size(), "model", 1, 0);
  engine.session().eval(tokens.data(), read, 0, nullptr);
  engine.session().rewind(rewound);
  const Bytes saved = engine.session().save(engine.identity());
  CHECK(saved.size() <= engine.session().most_saved_bytes());
  const Logits expected = next_logits(engine.session(), tokens, rewound);
  for (const squat::kernels::Isa& isa : isas_to_compare()) {
    setenv("SQUAT_ISA", isa.name, 1);
    Engine other(file.data(), file.size(), "model", 2, 0);
    unsetenv("SQUAT_ISA");
    other.session().eval(tokens.data() + 5, 40, 0, nullptr);  // something else was there
    other.session().restore(saved, other.identity(), "it");
    CHECK(other.session().length() == static_cast<int>(rewound));
    CHECK(std::equal(tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>(rewound),
                     other.session().tokens()));
    CHECK(other.session().save(other.identity()) == saved);
    CHECK(same(next_logits(other.session(), tokens, rewound), expected));
    const size_t last = tokens.size() - 10;
    other.session().rewind(last);
    const Logits again = next_logits(other.session(), tokens, last);
    CHECK(std::equal(again.rbegin(), again.rend(), expected.rbegin()));
  }
}

void test_what_is_loaded_goes_on() {
  for (const ModelOptions& options : squat::test::variants()) {
    check_continues(tiny_model(options).bytes(), 60, 60, 10);
    check_continues(tiny_model(options).bytes(), 60, 33, 20);
  }
  for (const ModelOptions& options : squat::test::windowed()) {
    check_continues(squat::test::windowed_file(options), 700, 700, 150);
    check_continues(squat::test::windowed_file(options), 700, 580, 150);
  }
}

// The model with as much of everything as there can be, in one width of tokens or the other.
Bytes small_file(const char* activations = "4:8") {
  ModelOptions options;
  options.activations = activations;
  options.described = options.convolutions = options.wide_first_token = options.peaks = true;
  options.recent_keys = 3;
  options.layers = 4;
  options.hidden = 20;
  options.heads = 2;
  options.kv_heads = 1;
  options.head_dim = 5;
  options.ffn = 16;
  return tiny_model(options).bytes();
}

void test_an_empty_session_is_one() {
  const Bytes file = small_file();
  Engine engine(file.data(), file.size(), "model", 1, 0);
  const Bytes empty = engine.session().save(engine.identity());
  const std::vector<int32_t> tokens = random_tokens(9);
  engine.session().eval(tokens.data(), 9, 0, nullptr);
  engine.session().restore(empty, engine.identity(), "it");
  CHECK(engine.session().length() == 0);
}

void test_damage_is_found() {
  const Bytes file = small_file();
  Engine engine(file.data(), file.size(), "model", 1, 0);
  const std::vector<int32_t> tokens = random_tokens(30);
  engine.session().eval(tokens.data(), 12, 0, nullptr);
  const Bytes saved = engine.session().save(engine.identity());
  engine.session().eval(tokens.data() + 12, 18, 0, nullptr);
  for (size_t at = 0; at < saved.size(); at++) {
    Bytes damaged = saved;
    damaged[at] ^= static_cast<uint8_t>(1u << at % 8);
    CHECK(refused(engine, damaged, at < 8 ? "no saved session" : at < 12 ? "version" : "damaged"));
  }
  for (size_t size = 0; size < saved.size(); size++) {
    const Bytes cut(saved.begin(), saved.begin() + static_cast<std::ptrdiff_t>(size));
    CHECK(refused(engine, cut, size < 32 ? "no saved session" : "says that they are"));
  }
  Bytes longer = saved;
  longer.push_back(0);
  CHECK(refused(engine, longer, "damaged"));

  const Bytes others = small_file("8");
  Engine other(others.data(), others.size(), "other", 1, 0);
  CHECK(refused(other, saved, "of another model file"));
  Engine little(file.data(), file.size(), "model", 1, 11);
  CHECK(refused(little, saved, "has 12 tokens, and the context is 11"));
}

// Bytes with a right hash, which somebody has made up.
void test_nobody_can_do_harm() {
  std::mt19937 random(7);
  for (const char* activations : {"4:8", "4", "8"}) {
    const Bytes file = small_file(activations);
    Engine engine(file.data(), file.size(), "model", 1, 40);
    const std::vector<int32_t> tokens = random_tokens(20);
    engine.session().eval(tokens.data(), 17, 0, nullptr);
    const Bytes saved = engine.session().save(engine.identity());
    const auto change = [&](size_t at, uint32_t value) {
      Bytes changed = saved;
      std::memcpy(changed.data() + at, &value, sizeof value);
      seal(&changed);
      return changed;
    };
    CHECK(refused(engine, change(12, 41), "41 tokens"));
    CHECK(refused(engine, change(12, UINT32_MAX), "4294967295 tokens"));
    CHECK(refused(engine, change(12, 18), "damaged"));
    CHECK(refused(engine, change(12, 0), "damaged"));
    CHECK(refused(engine, change(32, kVocabulary), "token 0 is 272"));
    CHECK(refused(engine, change(32, UINT32_MAX), "token 0 is -1"));
    for (const uint32_t first : {1u, 64u, 0x80000000u, UINT32_MAX}) {
      CHECK(refused(engine, change(32 + 17 * 4, first), "layer 0 holds tokens from"));
    }
    const size_t recent = 32 + 17 * 4 + 4 * 4;
    const bool has_recent = std::string(activations) != "8";
    for (const uint32_t first : {16u, 0x80000000u, UINT32_MAX}) {
      if (!has_recent) break;
      CHECK(refused(engine, change(recent, first), "it holds recent keys from"));
    }
    if (std::string(activations) == "4:8") {
      const size_t widths = recent + 4;
      CHECK(refused(engine, change(widths, 0x08080804), "has 4 bits in layer 0"));
      CHECK(refused(engine, change(widths, 0x08080809), "has 9 bits in layer 0"));
    }
    Bytes longer = saved;
    longer.resize(saved.size() + 64);
    const uint64_t size = longer.size();
    std::memcpy(longer.data() + 24, &size, sizeof size);
    seal(&longer);
    CHECK(refused(engine, longer, "more than its parts"));

    size_t loaded = 0;
    for (int round = 0; round < 3000; round++) {
      Bytes changed = saved;
      for (uint32_t i = 0; i <= random() % 4; i++) {
        changed[12 + random() % (changed.size() - 20)] = static_cast<uint8_t>(random());
      }
      seal(&changed);
      try {
        engine.session().restore(changed, engine.identity(), "it");
        loaded++;
      } catch (const squat::Error&) {
      }
      Logits logits(3 * kVocabulary);
      engine.session().eval(tokens.data() + 17, 3, 3, logits.data());
      engine.session().rewind(17);
    }
    CHECK(loaded > 100);
  }
}

void expect_error(squat_status status, squat_status expected, const char* part) {
  const bool ok = status == expected && std::strstr(squat_last_error(), part) != nullptr;
  if (!CHECK(ok)) std::fprintf(stderr, "  %d: '%s'\n", status, squat_last_error());
}

void test_c_interface() {
  const std::string model = "test_session.gguf", path = "test_session.state";
  const Bytes file = tiny_model().bytes();
  std::ofstream(model, std::ios::binary)
      .write(reinterpret_cast<const char*>(file.data()), static_cast<std::streamsize>(file.size()));
  squat_engine *engine = nullptr, *other = nullptr;
  CHECK(squat_load(model.c_str(), 1, 0, &engine) == SQUAT_OK);
  CHECK(squat_load(model.c_str(), 1, 0, &other) == SQUAT_OK);
  const std::vector<int32_t> tokens = random_tokens(30);
  CHECK(squat_eval(engine, tokens.data(), 20, SQUAT_LOGITS_NONE, nullptr, 0) == SQUAT_OK);
  CHECK(squat_save_session(engine, path.c_str()) == SQUAT_OK);
  CHECK(squat_save_session(engine, path.c_str()) == SQUAT_OK);  // it may be there
  CHECK(squat_load_session(other, path.c_str()) == SQUAT_OK);
  int32_t read[30];
  size_t n = 0;
  CHECK(squat_get_tokens(other, read, 30, &n) == SQUAT_OK && n == 20);
  CHECK(std::equal(read, read + 20, tokens.begin()));
  expect_error(squat_get_tokens(other, read, 19, &n), SQUAT_ERROR_ARGUMENT, "capacity is 19");

  uint8_t widths[3 * 20];
  size_t layers = 0;
  CHECK(squat_get_widths(other, 0, widths, sizeof widths, &layers) == SQUAT_OK && layers == 3);
  uint64_t wide[3], count = 0;
  CHECK(squat_wide_counts(engine, wide, 3, &count) == SQUAT_OK);
  for (size_t l = 0; l < 3; l++) {
    CHECK(wide[l] == static_cast<uint64_t>(std::count(widths + 20 * l, widths + 20 * l + 20, 8)));
  }
  uint8_t last[3];
  CHECK(squat_get_widths(other, 19, last, 3, &layers) == SQUAT_OK);
  for (size_t l = 0; l < 3; l++) CHECK(last[l] == widths[20 * l + 19]);
  expect_error(squat_get_widths(other, 21, widths, 60, &layers), SQUAT_ERROR_ARGUMENT, "begin");
  expect_error(squat_get_widths(other, 0, widths, 59, &layers), SQUAT_ERROR_ARGUMENT, "needs 60");

  expect_error(squat_save_session(engine, "missing/folder"), SQUAT_ERROR_FILE,
               "missing/folder: cannot be written");
  expect_error(squat_save_session(engine, "."), SQUAT_ERROR_FILE, ".: cannot be written");
  expect_error(squat_load_session(engine, "missing"), SQUAT_ERROR_FILE, "missing: cannot be");
  expect_error(squat_load_session(engine, "."), SQUAT_ERROR_FILE, "regular file");
  expect_error(squat_load_session(engine, model.c_str()), SQUAT_ERROR_FORMAT, model.c_str());
  expect_error(squat_load_session(engine, nullptr), SQUAT_ERROR_ARGUMENT, "path");
  CHECK(squat_length(engine) == 20);
  squat_free(engine);
  squat_free(other);
  std::remove(path.c_str());
  std::remove(model.c_str());
}

// What the head reads, and the logarithms that a score is the sum of.
void test_hidden_and_scores() {
  const Bytes file = tiny_model().bytes();
  const std::vector<int32_t> tokens = random_tokens(50);
  Engine engine(file.data(), file.size(), "model", 2, 0);
  Session& session = engine.session();
  std::vector<float> all(50 * 64), last(3 * 64);
  session.eval_hidden(tokens.data(), 50, 50, all.data());
  session.rewind(0);
  session.eval_hidden(tokens.data(), 20, 0, nullptr);
  session.eval_hidden(tokens.data() + 20, 30, 3, last.data());
  CHECK(std::memcmp(last.data(), all.data() + 47 * 64, last.size() * sizeof(float)) == 0);
  std::vector<double> each(49);
  const double sum = session.score(tokens.data(), 50, each.data());
  double added = 0;
  for (const double term : each) {
    CHECK(term < 0);
    added += term;
  }
  CHECK(added == sum);
  std::vector<double> some(9);
  session.score(tokens.data(), 10, some.data());
  CHECK(std::equal(some.begin(), some.end(), each.begin()));
}

}  // namespace

int main() {
  test_what_is_loaded_goes_on();
  test_an_empty_session_is_one();
  test_damage_is_found();
  test_nobody_can_do_harm();
  test_c_interface();
  test_hidden_and_scores();
  return squat::test::report("test_session");
}
