// The forward pass and the C interface. That the logits are right is tested from Python against a
// slow implementation (tests/test_engine.py); here they are compared with themselves: any chunks,
// any number of threads and any instruction set must give the same bits.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "api/engine.h"
#include "base/error.h"
#include "check.h"
#include "kernels/kernels.h"
#include "model_file.h"
#include "squat.h"

namespace {

std::atomic<size_t> allocations{0};

}  // namespace

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__
#endif
#endif
#if !defined(__SANITIZE_ADDRESS__)  // which has these functions itself
__attribute__((noinline)) void* operator new(size_t size) {
  allocations++;
  if (void* memory = std::malloc(size == 0 ? 1 : size)) return memory;
  throw std::bad_alloc();
}
__attribute__((noinline)) void operator delete(void* memory) noexcept { std::free(memory); }
__attribute__((noinline)) void operator delete(void* memory, size_t) noexcept { std::free(memory); }
#endif

namespace {

using squat::Engine;
using squat::test::Bytes;
using squat::test::isas_to_compare;
using squat::test::kVocabulary;
using squat::test::Logits;
using squat::test::ModelOptions;
using squat::test::random_tokens;
using squat::test::same;
using squat::test::tiny_model;
using squat::test::variants;
using squat::test::windowed;
using squat::test::windowed_file;

// All logits of the tokens, evaluated in chunks.
Logits evaluate(Engine& engine, const std::vector<int32_t>& tokens, size_t chunk) {
  Logits logits(tokens.size() * kVocabulary);
  engine.session().rewind(0);
  for (size_t begin = 0; begin < tokens.size(); begin += chunk) {
    const size_t n = std::min(chunk, tokens.size() - begin);
    engine.session().eval(tokens.data() + begin, n, n, logits.data() + begin * kVocabulary);
  }
  return logits;
}

void test_chunks_threads_and_isas() {
  const std::vector<int32_t> tokens = random_tokens(75);
  for (const ModelOptions& options : variants()) {
    const Bytes file = tiny_model(options).bytes();
    Engine engine(file.data(), file.size(), "model", 1, 0);
    const Logits expected = evaluate(engine, tokens, tokens.size());
    bool varied = false;
    for (const float x : expected) varied = varied || std::fabs(x - expected[0]) > 0.1f;
    CHECK(varied);
    for (const size_t chunk : {size_t{1}, size_t{7}, size_t{32}}) {
      CHECK(same(evaluate(engine, tokens, chunk), expected));
    }
    Engine threaded(file.data(), file.size(), "model", 3, 0);
    CHECK(same(evaluate(threaded, tokens, tokens.size()), expected));
    CHECK(same(evaluate(threaded, tokens, 7), expected));
    for (const squat::kernels::Isa& isa : isas_to_compare()) {
      setenv("SQUAT_ISA", isa.name, 1);
      Engine pinned(file.data(), file.size(), "model", 1, 0);
      CHECK(std::strcmp(pinned.isa(), isa.name) == 0);
      if (!CHECK(same(evaluate(pinned, tokens, 40), expected))) {
        std::fprintf(stderr, "  %s\n", isa.name);
      }
      unsetenv("SQUAT_ISA");
    }
    if (std::string(options.activations) == "4:8") {
      // There are many tokens of both kinds, or the test shows less than it seems to.
      uint64_t wide = 0;
      for (const uint64_t count : threaded.session().wide_counts()) wide += count;
      const uint64_t all = 3 * threaded.session().token_count();
      CHECK(wide > all / 10 && wide < all - all / 10);
    }
  }
}

// A new token behind so many that threads share its heads' keys and values.
void test_long_texts_in_threads() {
  const std::vector<int32_t> tokens = random_tokens(380);
  uint32_t threads = 2;
  for (ModelOptions options : variants()) {
    options.context = 380;
    options.heads = 12;
    options.kv_heads = 3;
    options.hidden = options.heads * options.head_dim;
    const Bytes file = tiny_model(options).bytes();
    Engine engine(file.data(), file.size(), "model", 1, 0);
    const Logits expected = evaluate(engine, tokens, tokens.size());
    Engine threaded(file.data(), file.size(), "model", threads, 0);
    threaded.session().eval(tokens.data(), 355, 0, nullptr);
    for (size_t i = 355; i < tokens.size(); i++) {
      Logits logits(kVocabulary);
      threaded.session().eval(&tokens[i], 1, 1, logits.data());
      CHECK(std::equal(logits.begin(), logits.end(), expected.begin() + i * kVocabulary));
    }
    threads = 6 - threads;  // 2 and 4 in turn
  }
}

void test_rewind() {
  const std::vector<int32_t> tokens = random_tokens(60);
  for (const ModelOptions& options : variants()) {
    const Bytes file = tiny_model(options).bytes();
    Engine engine(file.data(), file.size(), "model", 1, 0);
    const Logits expected = evaluate(engine, tokens, tokens.size());
    for (const size_t kept : {59, 33, 16, 1, 0}) {
      evaluate(engine, random_tokens(70), 70);  // other tokens behind what is kept
      engine.session().rewind(0);
      Logits logits(tokens.size() * kVocabulary);
      engine.session().eval(tokens.data(), tokens.size(), 0, nullptr);
      engine.session().rewind(kept);
      CHECK(engine.session().length() == static_cast<int>(kept));
      engine.session().eval(tokens.data() + kept, tokens.size() - kept, tokens.size() - kept,
                            logits.data() + kept * kVocabulary);
      CHECK(std::memcmp(logits.data() + kept * kVocabulary, expected.data() + kept * kVocabulary,
                        (tokens.size() - kept) * kVocabulary * sizeof(float)) == 0);
    }
  }
}

void test_windows() {
  const std::vector<int32_t> tokens = random_tokens(800);
  for (const ModelOptions& options : windowed()) {
    const Bytes file = windowed_file(options);
    Engine engine(file.data(), file.size(), "model", 1, 0);
    const Logits expected = evaluate(engine, tokens, tokens.size());
    for (const size_t chunk : {size_t{1}, size_t{7}, size_t{32}, size_t{300}}) {
      CHECK(same(evaluate(engine, tokens, chunk), expected));
    }
    Engine threaded(file.data(), file.size(), "model", 3, 0);
    const size_t before = allocations;
    threaded.session().eval(tokens.data(), tokens.size(), 0, nullptr);
    CHECK(allocations == before);
    CHECK(same(evaluate(threaded, tokens, 7), expected));
    for (const squat::kernels::Isa& isa : isas_to_compare()) {
      setenv("SQUAT_ISA", isa.name, 1);
      Engine pinned(file.data(), file.size(), "model", 1, 0);
      CHECK(same(evaluate(pinned, tokens, 40), expected));
      unsetenv("SQUAT_ISA");
    }
    // A session that is never longer than a layer's room keeps everything.
    const size_t few = 300;
    Engine whole(file.data(), file.size(), "model", 1, few);
    const std::vector<int32_t> begin(tokens.begin(), tokens.begin() + few);
    CHECK(std::memcmp(evaluate(whole, begin, 9).data(), expected.data(),
                      few * kVocabulary * sizeof(float)) == 0);
  }
}

void test_rewinding_windows() {
  constexpr size_t kTokens = 800, kNext = 3;
  const std::vector<int32_t> tokens = random_tokens(kTokens + kNext);
  for (const ModelOptions& options : windowed()) {
    const Bytes file = windowed_file(options);
    Engine engine(file.data(), file.size(), "model", 1, 0);
    const Logits expected = evaluate(engine, tokens, 100);
    size_t refused = 0;
    for (const size_t kept : {799, 750, 672, 671, 640, 600, 500, 300, 33, 1, 0}) {
      engine.session().rewind(0);
      engine.session().eval(tokens.data(), kTokens, 0, nullptr);
      try {
        engine.session().rewind(kept);
      } catch (const squat::Error& error) {
        CHECK(kept > 0 && kept + squat::Session::kTakenBack < kTokens);
        CHECK(std::strstr(error.what(), "is too far back for what looks at a few") != nullptr);
        CHECK(engine.session().length() == kTokens);
        refused++;
      }
      // Refused or not, it goes on where it is.
      const size_t length = static_cast<size_t>(engine.session().length());
      Logits logits(kNext * kVocabulary);
      engine.session().eval(tokens.data() + length, kNext, kNext, logits.data());
      CHECK(std::memcmp(logits.data(), expected.data() + length * kVocabulary,
                        logits.size() * sizeof(float)) == 0);
    }
    CHECK(refused >= 4);
  }
}

void test_windows_take_less_memory() {
  ModelOptions options;
  options.described = true;
  options.context = 20000;
  const auto bytes = [&](const std::vector<uint32_t>& windows) {
    const Bytes file = windowed_file(options, windows);
    return Engine(file.data(), file.size(), "model", 1, 0).session().cache_bytes();
  };
  const size_t whole = bytes({0, 0, 0}), narrow = bytes({100, 100, 100});
  CHECK(bytes({20000, 20000, 20000}) == whole);
  CHECK(narrow < whole / 20);
  CHECK(bytes({100, 0, 100}) > whole / 3 && bytes({100, 0, 100}) < whole / 2);
}

void test_wanted_and_score() {
  const std::vector<int32_t> tokens = random_tokens(50);
  const Bytes file = tiny_model().bytes();
  Engine engine(file.data(), file.size(), "model", 2, 0);
  const Logits all = evaluate(engine, tokens, tokens.size());
  Logits last(3 * kVocabulary);
  engine.session().rewind(0);
  engine.session().eval(tokens.data(), tokens.size(), 3, last.data());
  CHECK(std::memcmp(last.data(), all.data() + 47 * kVocabulary, last.size() * sizeof(float)) == 0);

  double expected = 0;
  for (size_t i = 0; i + 1 < tokens.size(); i++) {
    const float* row = all.data() + i * kVocabulary;
    double sum = 0;
    for (int k = 0; k < kVocabulary; k++) sum += std::exp(static_cast<double>(row[k]));
    expected += row[tokens[i + 1]] - std::log(sum);
  }
  const double score = engine.session().score(tokens.data(), tokens.size(), nullptr);
  CHECK(std::fabs(score - expected) < 1e-4);
  CHECK(engine.session().length() == 50);
  CHECK(engine.session().score(tokens.data(), 1, nullptr) == 0);
}

void test_evaluation_allocates_nothing() {
  for (const ModelOptions& options : variants()) {
    const Bytes file = tiny_model(options).bytes();
    Engine engine(file.data(), file.size(), "model", 2, 0);
    const std::vector<int32_t> tokens = random_tokens(70);
    Logits logits(tokens.size() * kVocabulary);
    const size_t before = allocations;
    engine.session().eval(tokens.data(), 40, 40, logits.data());
    for (size_t i = 40; i < 70; i++) engine.session().eval(&tokens[i], 1, 1, logits.data());
    engine.session().score(tokens.data(), 70, nullptr);
    CHECK(allocations == before);
  }
}

void test_engines_in_threads() {
  const Bytes file = tiny_model().bytes();
  const std::vector<int32_t> tokens = random_tokens(40);
  std::vector<Logits> results(4);
  std::vector<std::thread> threads;
  for (Logits& result : results) {
    threads.emplace_back([&] {
      Engine engine(file.data(), file.size(), "model", 2, 0);
      for (int round = 0; round < 5; round++) result = evaluate(engine, tokens, 13);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const Logits& result : results) CHECK(same(result, results[0]));
}

void test_sampler() {
  const Logits logits = {1.0f, 3.0f, 2.0f, 3.0f, -1.0f};
  const auto draw = [&](squat_sampling sampling, int count) {
    squat_sampler* sampler = nullptr;
    CHECK(squat_sampler_create(&sampling, 5, &sampler) == SQUAT_OK);
    std::vector<int> counts(5);
    for (int i = 0; i < count; i++) {
      int32_t token = -1;
      CHECK(squat_sampler_next(sampler, logits.data(), &token) == SQUAT_OK);
      counts[static_cast<size_t>(token)]++;
    }
    squat_sampler_free(sampler);
    return counts;
  };
  squat_sampling s = squat_sampling_default();
  CHECK(draw(s, 10)[1] == 10);  // greedy; of equals the first
  s.temperature = 1;
  s.seed = 5;
  const int n = 20000;
  double total = 0;
  for (const float x : logits) total += std::exp(x);
  const std::vector<int> free = draw(s, n);
  for (size_t i = 0; i < 5; i++) {
    const double expected = n * std::exp(logits[i]) / total;
    CHECK(std::fabs(free[i] - expected) < 5 * std::sqrt(expected) + 1);
  }
  CHECK(draw(s, 100) == draw(s, 100));
  squat_sampling other = s;
  other.seed = 6;
  CHECK(draw(s, 100) != draw(other, 100));

  const auto only = [&](squat_sampling sampling, std::vector<bool> expected) {
    const std::vector<int> counts = draw(sampling, 2000);
    for (size_t i = 0; i < 5; i++) CHECK((counts[i] > 0) == expected[i]);
  };
  squat_sampling k = s;
  k.top_k = 3;
  only(k, {false, true, true, true, false});
  squat_sampling p = s;
  p.top_p = 0.5f;  // the two best have 0.397 each
  only(p, {false, true, false, true, false});
  p.top_p = 0.39f;
  only(p, {false, true, false, false, false});
  squat_sampling m = s;
  m.min_p = 0.2f;  // exp(-1) = 0.37 of the best stays, exp(-2) = 0.14 goes
  only(m, {false, true, true, true, false});
  m.top_p = 0.1f;
  only(m, {false, true, false, false, false});
  // A penalty of 2 halves the first best, so that greedy moves on: 1, 3, 2, then 1.5 of the first.
  squat_sampling r = squat_sampling_default();
  r.repetition_penalty = 2;
  CHECK((draw(r, 3) == std::vector<int>{0, 1, 1, 1, 0}));

  for (const auto& change : std::vector<void (*)(squat_sampling*)>{
           [](squat_sampling* x) { x->temperature = -1; },
           [](squat_sampling* x) { x->temperature = NAN; }, [](squat_sampling* x) { x->top_p = 0; },
           [](squat_sampling* x) { x->top_p = 1.1f; }, [](squat_sampling* x) { x->min_p = -0.1f; },
           [](squat_sampling* x) { x->repetition_penalty = 0; }}) {
    squat_sampling bad = squat_sampling_default();
    change(&bad);
    squat_sampler* sampler = nullptr;
    CHECK(squat_sampler_create(&bad, 5, &sampler) == SQUAT_ERROR_ARGUMENT);
    CHECK(std::strncmp(squat_last_error(), "sampling: ", 10) == 0);
  }
  // A model may produce anything.
  s.top_p = 0.9f;
  s.top_k = 4;
  squat_sampler* sampler = nullptr;
  CHECK(squat_sampler_create(&s, 5, &sampler) == SQUAT_OK);
  const Logits broken = {NAN, INFINITY, -INFINITY, NAN, 0};
  int32_t token = -1;
  CHECK(squat_sampler_next(sampler, broken.data(), &token) == SQUAT_OK && token == 1);
  squat_sampler_free(sampler);
}

struct Generated {
  std::vector<int32_t> tokens;
  std::string text;
  size_t stop_after = SIZE_MAX;
};

int collect(int32_t token, const char* text, size_t size, void* user) {
  Generated& out = *static_cast<Generated*>(user);
  out.tokens.push_back(token);
  out.text.append(text, size);
  return out.tokens.size() == out.stop_after;
}

void expect_error(squat_status status, squat_status expected, const char* part) {
  const bool ok = status == expected && std::strstr(squat_last_error(), part) != nullptr;
  if (!CHECK(ok)) std::fprintf(stderr, "  %d: '%s'\n", status, squat_last_error());
}

void write_file(const std::string& path, const Bytes& file) {
  std::FILE* out = std::fopen(path.c_str(), "wb");
  CHECK(out != nullptr && std::fwrite(file.data(), 1, file.size(), out) == file.size());
  std::fclose(out);
}

void test_c_interface() {
  const std::string path = "test_engine.gguf";  // in the build folder
  const Bytes file = tiny_model().bytes();
  write_file(path, file);

  squat_engine* engine = nullptr;
  expect_error(squat_load("missing.gguf", 1, 0, &engine), SQUAT_ERROR_FILE, "missing.gguf");
  expect_error(squat_load(".", 1, 0, &engine), SQUAT_ERROR_FILE, "regular file");
  expect_error(squat_load(nullptr, 1, 0, &engine), SQUAT_ERROR_ARGUMENT, "path");
  expect_error(squat_load(path.c_str(), 100000, 0, &engine), SQUAT_ERROR_ARGUMENT,
               "threads: 100000");
  expect_error(squat_load(path.c_str(), 1, 81, &engine), SQUAT_ERROR_ARGUMENT, "context: 81");
  setenv("SQUAT_ISA", "sse9", 1);
  expect_error(squat_load(path.c_str(), 1, 0, &engine), SQUAT_ERROR_ISA, "sse9");
  unsetenv("SQUAT_ISA");
  CHECK(engine == nullptr);

  CHECK(squat_load(path.c_str(), 2, 64, &engine) == SQUAT_OK);
  squat_info info;
  CHECK(squat_get_info(engine, &info) == SQUAT_OK);
  CHECK(info.n_vocab == kVocabulary && info.n_layer == 3 && info.n_context == 64);
  CHECK(info.n_threads == 2 && info.file_bytes == file.size() && info.bos_token == 1);
  CHECK(std::string(info.architecture) == "llama" && info.eos_token == 2);
  CHECK(info.n_eos_tokens == 1 && info.eos_tokens[0] == 2);
  CHECK(std::strstr(info.kernels, "a8 w4: matmul_") != nullptr);

  const char* text = nullptr;
  size_t size = 0;
  CHECK(squat_get_string(engine, "tokenizer.ggml.pre", &text, &size) == SQUAT_OK);
  CHECK(std::string(text, size) == "gpt-2");
  expect_error(squat_get_string(engine, "no.such", &text, &size), SQUAT_ERROR_FORMAT, "no.such");

  // Evaluation; after every failure the session is as before.
  const std::vector<int32_t> tokens = random_tokens(40);
  Logits logits(40 * kVocabulary);
  CHECK(squat_eval(engine, tokens.data(), 40, SQUAT_LOGITS_ALL, logits.data(), logits.size()) ==
        SQUAT_OK);
  CHECK(squat_length(engine) == 40);
  const int32_t bad[] = {5, kVocabulary}, negative[] = {-1};
  expect_error(squat_eval(engine, bad, 2, SQUAT_LOGITS_NONE, nullptr, 0), SQUAT_ERROR_ARGUMENT,
               "element 1 is 272");
  expect_error(squat_eval(engine, negative, 1, SQUAT_LOGITS_NONE, nullptr, 0), SQUAT_ERROR_ARGUMENT,
               "element 0 is -1");
  expect_error(squat_eval(engine, tokens.data(), 25, SQUAT_LOGITS_NONE, nullptr, 0),
               SQUAT_ERROR_CONTEXT, "25 after the 40 in the session exceed the context of 64");
  expect_error(squat_eval(engine, tokens.data(), 2, SQUAT_LOGITS_ALL, logits.data(), kVocabulary),
               SQUAT_ERROR_ARGUMENT, "capacity");
  expect_error(squat_eval(engine, tokens.data(), 0, SQUAT_LOGITS_NONE, nullptr, 0),
               SQUAT_ERROR_ARGUMENT, "tokens");
  expect_error(squat_rewind(engine, 41), SQUAT_ERROR_ARGUMENT, "length: 41");
  CHECK(squat_length(engine) == 40);
  uint64_t wide[3], count = 0;
  CHECK(squat_wide_counts(engine, wide, 3, &count) == SQUAT_OK && count == 40);
  expect_error(squat_wide_counts(engine, wide, 2, &count), SQUAT_ERROR_ARGUMENT, "wide");

  // Text.
  int32_t ids[64];
  size_t n = 0;
  const std::string hello = "hello world";
  CHECK(squat_tokenize(engine, hello.data(), hello.size(), ids, 64, &n) == SQUAT_OK && n == 4);
  expect_error(squat_tokenize(engine, hello.data(), hello.size(), ids, 2, &n), SQUAT_ERROR_ARGUMENT,
               "capacity is 2, needs 4");
  CHECK(n == 4);
  char buffer[64];
  CHECK(squat_detokenize(engine, ids, 4, buffer, 64, &size) == SQUAT_OK);
  CHECK(std::string(buffer, size) == hello);
  expect_error(squat_detokenize(engine, bad, 2, buffer, 64, &size), SQUAT_ERROR_ARGUMENT,
               "out of range");
  CHECK(squat_get_piece(engine, ids[0], &text, &size) == SQUAT_OK);
  CHECK(std::string(text, size) == "hello");
  CHECK(squat_get_piece(engine, 1, &text, &size) == SQUAT_OK && size == 0);
  expect_error(squat_get_piece(engine, -1, &text, &size), SQUAT_ERROR_ARGUMENT, "token");

  // Generation is evaluation and sampling by hand.
  const squat_sampling greedy = squat_sampling_default();
  squat_sampler* sampler = nullptr;
  CHECK(squat_sampler_create(&greedy, info.n_vocab, &sampler) == SQUAT_OK);
  Generated generated;
  CHECK(squat_rewind(engine, 0) == SQUAT_OK);
  CHECK(squat_generate(engine, sampler, ids, 4, 12, collect, &generated) == SQUAT_OK);
  CHECK(squat_rewind(engine, 0) == SQUAT_OK);
  std::vector<int32_t> by_hand(ids, ids + 4);
  while (by_hand.size() < 16) {
    CHECK(squat_eval(engine, by_hand.data() + squat_length(engine),
                     by_hand.size() - squat_length(engine), SQUAT_LOGITS_LAST, logits.data(),
                     logits.size()) == SQUAT_OK);
    int32_t token = -1;
    CHECK(squat_sampler_next(sampler, logits.data(), &token) == SQUAT_OK);
    if (token == info.eos_token) break;
    by_hand.push_back(token);
  }
  CHECK(generated.tokens == std::vector<int32_t>(by_hand.begin() + 4, by_hand.end()));
  CHECK(!generated.tokens.empty());

  Generated stopped;
  stopped.stop_after = 2;
  CHECK(squat_rewind(engine, 0) == SQUAT_OK);
  CHECK(squat_generate(engine, sampler, ids, 4, 12, collect, &stopped) == SQUAT_STOPPED);
  CHECK(stopped.tokens.size() == 2);
  // A full context ends a generation; a prompt that does not fit is an error.
  Generated all;
  CHECK(squat_rewind(engine, 0) == SQUAT_OK);
  CHECK(squat_generate(engine, sampler, tokens.data(), 40, 1000, collect, &all) == SQUAT_OK);
  CHECK(all.tokens.size() <= 25 && squat_length(engine) <= 64);
  expect_error(squat_generate(engine, sampler, random_tokens(65).data(), 65, 1, collect, &all),
               SQUAT_ERROR_CONTEXT, "context of 64");
  const auto throws = [](int32_t, const char*, size_t, void*) -> int { throw 1; };
  CHECK(squat_rewind(engine, 0) == SQUAT_OK);
  CHECK(squat_generate(engine, sampler, ids, 4, 5, throws, nullptr) == SQUAT_ERROR_INTERNAL);
  squat_profile_entry entries[64];
  size_t steps = 0;
  CHECK(squat_set_profiling(engine, 1) == SQUAT_OK);
  expect_error(squat_profile(engine, entries, 1, &steps), SQUAT_ERROR_ARGUMENT, "entries");
  CHECK(squat_profile(engine, entries, 64, &steps) == SQUAT_OK && steps > 5);
  squat_sampler_free(sampler);
  squat_free(engine);
  squat_free(nullptr);
  std::remove(path.c_str());
}

// Any of several tokens ends an answer.
void test_ends() {
  const std::string path = "test_ends.gguf";
  squat::test::GgufBuilder model = tiny_model(ModelOptions{});
  const auto generate = [&path, &model] {
    write_file(path, model.bytes());
    squat_engine* engine = nullptr;
    squat_sampler* sampler = nullptr;
    const squat_sampling greedy = squat_sampling_default();
    const int32_t prompt[] = {1, 100};
    Generated generated;
    CHECK(squat_load(path.c_str(), 1, 0, &engine) == SQUAT_OK);
    CHECK(squat_sampler_create(&greedy, kVocabulary, &sampler) == SQUAT_OK);
    CHECK(squat_generate(engine, sampler, prompt, 2, 12, collect, &generated) == SQUAT_OK);
    squat_sampler_free(sampler);
    squat_free(engine);
    return generated.tokens;
  };
  const std::vector<int32_t> whole = generate();
  CHECK(whole.size() > 2);
  const int32_t end = whole.back();
  model.u32_array("squat.tokenizer.eos_token_ids", {2, static_cast<uint32_t>(end)});
  const std::vector<int32_t> cut = generate();
  const auto found = std::find(whole.begin(), whole.end(), end);
  CHECK(cut == std::vector<int32_t>(whole.begin(), found));
  std::remove(path.c_str());
}

// The profile counts what was asked for while it is on, and nothing else.
void test_profile() {
  const Bytes file = tiny_model(ModelOptions{}).bytes();
  Engine engine(file.data(), file.size(), "model", 1, 0);
  const std::vector<int32_t> tokens = random_tokens(6);
  const auto entry = [&](squat::Step step) {
    return engine.session().profile().entries()[static_cast<size_t>(step)];
  };
  evaluate(engine, tokens, 6);
  CHECK(entry(squat::Step::kHead).calls == 0);
  engine.session().profile().restart(true);
  evaluate(engine, tokens, 3);
  CHECK(entry(squat::Step::kHead).calls == 2);
  CHECK(entry(squat::Step::kHead).macs == uint64_t{6} * kVocabulary * 64);
  CHECK(entry(squat::Step::kHead).bytes == uint64_t{2} * kVocabulary * 64);
  CHECK(entry(squat::Step::kDown).macs == uint64_t{6} * 3 * 64 * 96);
  // Token i sees i + 1 keys of each of four query heads of 16 elements, in three layers.
  CHECK(entry(squat::Step::kScores).macs == uint64_t{1 + 2 + 3 + 4 + 5 + 6} * 64 * 3);
  double seconds = 0;
  for (size_t i = 0; i < squat::kSteps; i++) {
    seconds += engine.session().profile().entries()[i].seconds;
    CHECK(engine.session().profile().entries()[i].step != nullptr);
  }
  CHECK(seconds > 0);
  engine.session().profile().restart(false);
  evaluate(engine, tokens, 6);
  CHECK(entry(squat::Step::kHead).calls == 0);
}

// What texts have in common is not computed again, and nobody can tell: scores are those of an
// engine that has seen nothing, whatever was evaluated in between.
void test_scores_of_texts_that_begin_alike() {
  std::vector<std::pair<Bytes, size_t>> files;
  for (const ModelOptions& options : variants())
    files.emplace_back(tiny_model(options).bytes(), 70);
  for (const ModelOptions& options : windowed()) files.emplace_back(windowed_file(options), 700);
  for (const auto& [file, longest] : files) {
    Engine engine(file.data(), file.size(), "model", 1, 0), fresh(engine, 1, 0);
    std::vector<int32_t> text = random_tokens(longest);
    const std::vector<int32_t> others = random_tokens(longest + 3);
    uint64_t asked = 0;
    for (const size_t begin : {longest, longest / 2, size_t{3}, longest / 2, size_t{1}, size_t{0},
                               longest - 1, longest, longest}) {
      // Other tokens from there on, and sometimes another length.
      for (size_t i = begin; i < longest; i++) text[i] = others[i + begin % 3];
      const size_t n = begin % 2 == 0 ? longest : longest - begin / 3;
      std::vector<double> each(n - 1), expected(n - 1);
      const double sum = engine.session().score(text.data(), n, each.data());
      fresh.session().rewind(0);
      CHECK(sum == fresh.session().score(text.data(), n, expected.data()));
      CHECK(each == expected);
      CHECK(engine.session().length() == static_cast<int>(n));
      asked += n;
      if (begin == 3) {  // something else in between
        engine.session().rewind(n - 2);
        engine.session().eval(others.data(), 2, 0, nullptr);
      }
    }
    // A layer with a window holds no long text from its beginning.
    CHECK(longest == 700 || engine.session().token_count() < asked * 3 / 4);
  }
}

}  // namespace

int main() {
  test_chunks_threads_and_isas();
  test_long_texts_in_threads();
  test_rewind();
  test_windows();
  test_scores_of_texts_that_begin_alike();
  test_rewinding_windows();
  test_windows_take_less_memory();
  test_wanted_and_score();
  test_evaluation_allocates_nothing();
  test_engines_in_threads();
  test_ends();
  test_profile();
  test_sampler();
  test_c_interface();
  return squat::test::report("test_engine");
}
