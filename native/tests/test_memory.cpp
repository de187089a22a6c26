// Memory that runs out, at every place where some is asked for: an error with its type, nothing
// lost, and the engine as it was. And memory that stays what it was, however much is generated.
//
// This program's own operator new and mmap count, and fail when they are told to.
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <new>
#include <string>
#include <vector>

#include "check.h"
#include "model_file.h"
#include "squat.h"

namespace {

// Of this thread: how many more requests succeed, and how many pieces it holds.
thread_local long left = -1;  // -1: all do
thread_local long held = 0;

bool granted() {
  if (left == 0) return false;
  if (left > 0) left--;
  return true;
}

void* allocate(size_t size, size_t alignment) {
  if (!granted()) return nullptr;
  const size_t rounded = (size + alignment - 1) / alignment * alignment;
  void* data = std::aligned_alloc(alignment, rounded == 0 ? alignment : rounded);
  held += data != nullptr;
  return data;
}

void release(void* data) {
  held -= data != nullptr;
  std::free(data);
}

void* allocate_or_throw(size_t size, size_t alignment) {
  void* data = allocate(size, alignment);
  if (data == nullptr) throw std::bad_alloc();
  return data;
}

}  // namespace

void* operator new(size_t size) { return allocate_or_throw(size, alignof(std::max_align_t)); }
void* operator new(size_t size, const std::nothrow_t&) noexcept {
  return allocate(size, alignof(std::max_align_t));
}
void* operator new(size_t size, std::align_val_t alignment) {
  return allocate_or_throw(size, static_cast<size_t>(alignment));
}
void operator delete(void* data) noexcept { release(data); }
void operator delete(void* data, size_t) noexcept { release(data); }
void operator delete(void* data, std::align_val_t) noexcept { release(data); }
void operator delete(void* data, size_t, std::align_val_t) noexcept { release(data); }

extern "C" void* mmap(void* address, size_t size, int protection, int flags, int file,
                      off_t offset) noexcept {
  if (!granted()) {
    errno = ENOMEM;
    return MAP_FAILED;
  }
  void* data =
      reinterpret_cast<void*>(syscall(SYS_mmap, address, size, protection, flags, file, offset));
  held += data != MAP_FAILED;
  return data;
}

extern "C" int munmap(void* data, size_t size) noexcept {
  held--;
  return static_cast<int>(syscall(SYS_munmap, data, size));
}

namespace {

using squat::test::Bytes;
using squat::test::kVocabulary;
using squat::test::Logits;
using squat::test::ModelOptions;
using squat::test::random_tokens;
using squat::test::tiny_model;

constexpr const char* kFile = "test_memory.gguf";
constexpr const char* kSession = "test_memory.session";

// Calls body() with one more request granted each time, until it succeeds; between, nothing may be
// left behind. Returns the number of failures.
template <class Body>
long until_it_succeeds(Body&& body) {
  for (long granted_requests = 0;; granted_requests++) {
    const long before = held;
    left = granted_requests;
    const squat_status status = body();
    left = -1;
    if (status == SQUAT_OK) return granted_requests;
    if (!CHECK(status == SQUAT_ERROR_MEMORY)) std::fprintf(stderr, "  %s\n", squat_last_error());
    CHECK(held == before);
    if (squat::test::failures > 0 || granted_requests > 1000000) return granted_requests;
  }
}

Logits logits_of(squat_engine* engine, const std::vector<int32_t>& tokens) {
  Logits logits(kVocabulary);
  CHECK(squat_rewind(engine, 0) == SQUAT_OK);
  CHECK(squat_eval(engine, tokens.data(), tokens.size(), SQUAT_LOGITS_LAST, logits.data(),
                   logits.size()) == SQUAT_OK);
  return logits;
}

void test_every_request_may_fail(const ModelOptions& options) {
  const Bytes file = tiny_model(options).bytes();
  std::ofstream(kFile, std::ios::binary)
      .write(reinterpret_cast<const char*>(file.data()), static_cast<std::streamsize>(file.size()));
  squat_engine *engine = nullptr, *other = nullptr;
  {  // what a program makes once is there from now on
    CHECK(squat_load(kFile, 1, 0, &engine) == SQUAT_OK);
    int32_t id;
    size_t n;
    CHECK(squat_tokenize(engine, "a", 1, &id, 1, &n) == SQUAT_OK);
    squat_free(engine);
  }
  CHECK(until_it_succeeds([&] { return squat_load(kFile, 1, 0, &engine); }) > 20);
  const std::vector<int32_t> tokens = random_tokens(40);
  const Logits expected = logits_of(engine, tokens);

  // Evaluating asks for none.
  Logits found(kVocabulary);
  CHECK(squat_rewind(engine, 0) == SQUAT_OK);
  left = 0;
  const squat_status status = squat_eval(engine, tokens.data(), tokens.size(), SQUAT_LOGITS_LAST,
                                         found.data(), found.size());
  left = -1;
  CHECK(status == SQUAT_OK && found == expected);

  CHECK(until_it_succeeds([&] { return squat_share(engine, 1, 0, &other); }) > 0);
  CHECK(logits_of(other, tokens) == expected);
  squat_free(other);

  // Of a fresh engine each time, since the first call makes what is kept: the tokenizer.
  int32_t ids[64];
  size_t n = 0;
  CHECK(until_it_succeeds([&] {
          const long requests = left;
          left = -1;
          squat_engine* fresh = nullptr;
          CHECK(squat_load(kFile, 1, 0, &fresh) == SQUAT_OK);
          left = requests;
          const squat_status status = squat_tokenize(fresh, "the cafe", 8, ids, 64, &n);
          left = -1;
          squat_free(fresh);
          return status;
        }) > 0);
  CHECK(n > 0);
  const size_t length = squat_length(engine);
  CHECK(until_it_succeeds([&] { return squat_save_session(engine, kSession); }) > 0);
  CHECK(until_it_succeeds([&] {
          const squat_status status = squat_load_session(engine, kSession);
          CHECK(squat_length(engine) == length);
          return status;
        }) > 0);
  CHECK(logits_of(engine, tokens) == expected);
  squat_free(engine);
}

int nothing(int32_t, const char*, size_t, void*) { return 0; }

void test_2000_generations_hold_what_20_do() {
  squat_engine* engine = nullptr;
  squat_sampling sampling = squat_sampling_default();
  sampling.temperature = 1;
  const std::vector<int32_t> prompt = random_tokens(5);
  const long before = held;
  long after_20 = 0;
  CHECK(squat_load(kFile, 1, 0, &engine) == SQUAT_OK);
  for (uint64_t i = 1; i <= 2000; i++) {
    sampling.seed = i;
    squat_sampler* sampler = nullptr;
    CHECK(squat_sampler_create(&sampling, kVocabulary, &sampler) == SQUAT_OK);
    CHECK(squat_rewind(engine, 0) == SQUAT_OK);
    CHECK(squat_generate(engine, sampler, prompt.data(), prompt.size(), 4, nothing, nullptr) ==
          SQUAT_OK);
    squat_sampler_free(sampler);
    if (i == 20) after_20 = held;
  }
  CHECK(held == after_20);
  squat_free(engine);
  CHECK(held == before);
}

}  // namespace

int main() {
  ModelOptions options;
  options.activations = "4:8";
  test_every_request_may_fail(options);
  test_2000_generations_hold_what_20_do();
  std::remove(kFile);
  std::remove(kSession);
  return squat::test::report("test_memory");
}
