// The GGUF reader and the model loader against files that lie.
#include "../fuzz/fuzz_gguf.cpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "model_file.h"

namespace {

using squat::Engine;
using squat::Error;
using squat::Gguf;
using squat::test::GgufBuilder;
using squat::test::hadamard_blocks;
using squat::test::ModelOptions;
using squat::test::tiny_model;

// The message with which the bytes are refused; "" if they are not.
std::string refusal(const std::vector<uint8_t>& bytes) {
  // A copy of exactly this size, so that the sanitizer sees a read past its end.
  const std::vector<uint8_t> exact(bytes);
  try {
    Engine engine(exact.data(), exact.size(), "model.gguf", 1, 0);
    engine.tokenizer();
  } catch (const Error& error) {
    CHECK(error.status() == SQUAT_ERROR_FORMAT);
    return error.what();
  }
  return "";
}

// Each part must stand in the message.
void expect_refusal(const char* name, const std::vector<uint8_t>& bytes,
                    const std::vector<std::string>& parts) {
  const std::string message = refusal(bytes);
  bool ok = message.find('\n') == std::string::npos && message.rfind("model.gguf: ", 0) == 0;
  for (const std::string& part : parts) ok = ok && message.find(part) != std::string::npos;
  if (!CHECK(ok)) std::fprintf(stderr, "  %s: '%s'\n", name, message.c_str());
}

void expect_refusal(const char* name, const GgufBuilder& file,
                    const std::vector<std::string>& parts) {
  expect_refusal(name, file.bytes(), parts);
}

void test_values() {
  GgufBuilder file;
  file.u32("squat.format_version", 1);
  file.f32("a.float", 0.25f);
  file.boolean("a.bool", true);
  file.string("a.string", "text");
  file.f32_array("a.floats", {1.0f, -2.0f});
  file.i32_array("a.ints", {7, -8, 9});
  file.string_array("a.strings", {"x", "", "yz"});
  file.floats("some.tensor", {1, 2, 3});
  const std::vector<uint8_t> bytes = file.bytes();
  const Gguf gguf(bytes.data(), bytes.size(), "values");
  CHECK(gguf.u32("squat.format_version") == 1);
  CHECK(gguf.f32("a.float") == 0.25f);
  CHECK(gguf.boolean("a.bool"));
  CHECK(gguf.string("a.string") == "text");
  CHECK((gguf.f32_array("a.floats") == std::vector<float>{1, -2}));
  CHECK((gguf.i32_array("a.ints") == std::vector<int32_t>{7, -8, 9}));
  CHECK((gguf.string_array("a.strings") == std::vector<std::string_view>{"x", "", "yz"}));
  const squat::GgufTensor* tensor = gguf.find_tensor("some.tensor");
  CHECK(tensor != nullptr && tensor->ne[0] == 3 && tensor->size == 12);
  CHECK(gguf.find_tensor("other") == nullptr && !gguf.has("other"));
}

void test_header() {
  expect_refusal("empty", std::vector<uint8_t>{}, {"not a GGUF file"});
  expect_refusal("text", std::vector<uint8_t>{'h', 'e', 'l', 'l', 'o'}, {"not a GGUF file"});
  GgufBuilder file = tiny_model();
  file.version = 2;
  expect_refusal("version", file, {"GGUF version is 2"});
  file.version = 0x03000000;  // big-endian
  expect_refusal("endianness", file, {"GGUF version is 50331648", "little-endian"});

  file = tiny_model();
  file.erase("squat.format_version");
  expect_refusal("not Squat", file, {"not a Squat one", "squat export"});
  for (const uint32_t version : {0u, 3u}) {
    file.u32("squat.format_version", version);
    expect_refusal("format version", file,
                   {"'squat.format_version' is " + std::to_string(version), "reads 1 to 2"});
  }

  const auto patched = [](size_t offset, uint64_t value) {
    std::vector<uint8_t> bytes = tiny_model().bytes();
    std::memcpy(bytes.data() + offset, &value, sizeof value);
    return bytes;
  };
  expect_refusal("tensor count", patched(8, UINT64_MAX), {"tensor count is 18446744073709551615"});
  expect_refusal("key count", patched(16, uint64_t{1} << 40), {"key count is 1099511627776"});
}

void test_metadata() {
  using G = GgufBuilder;
  const auto with = [](const std::string& encoded) {
    GgufBuilder file = tiny_model();
    file.set("evil", encoded);
    return file;
  };
  expect_refusal("unknown type", with(G::raw<uint32_t>(13)), {"key 'evil' type is 13"});
  expect_refusal("bool", with(G::raw<uint32_t>(7) + G::raw<uint8_t>(2)), {"'evil' is 2", "bool"});
  expect_refusal("string", with(G::raw<uint32_t>(8) + G::raw(UINT64_MAX)),
                 {"key 'evil'", "18446744073709551615"});
  expect_refusal("array of arrays", with(G::array_header(9, 1) + G::array_header(4, 0)),
                 {"'evil' is an array of arrays"});
  expect_refusal("element type", with(G::array_header(99, 1)), {"'evil' element type is 99"});
  // Element counts that no file can hold, of every element size; none may allocate or loop.
  for (const uint32_t element : {0u, 4u, 8u, 12u}) {
    for (const uint64_t count : {uint64_t{1} << 61, UINT64_MAX, uint64_t{1} << 32}) {
      expect_refusal("array", with(G::array_header(element, count)),
                     {"'evil' element count is " + std::to_string(count)});
    }
  }
  GgufBuilder file = tiny_model();
  file.keys.emplace_back("squat.format_version", G::raw<uint32_t>(4) + G::raw<uint32_t>(1));
  expect_refusal("duplicate key", file, {"'squat.format_version' stands twice"});
  file = tiny_model();
  file.u32(std::string(300, 'k'), 1);
  expect_refusal("key length", file, {"key length is 300"});
  for (const uint32_t alignment : {0u, 1u, 48u, 1u << 31}) {
    file = tiny_model();
    file.u32("general.alignment", alignment);
    expect_refusal("alignment", file, {"'general.alignment' is " + std::to_string(alignment)});
  }
  file = tiny_model();
  file.u32("general.alignment", 256);
  file.alignment = 256;
  CHECK(refusal(file.bytes()).empty());
}

void test_tensors() {
  const auto with = [](auto&& change) {
    GgufBuilder file = tiny_model();
    change(file.tensor("blk.1.ffn_up.weight"));
    return file;
  };
  using Tensor = GgufBuilder::Tensor;
  const std::string name = "tensor 'blk.1.ffn_up.weight'";
  expect_refusal("rank 0", with([](Tensor& t) { t.shape.clear(); }), {name, "rank is 0"});
  expect_refusal("rank 5", with([](Tensor& t) { t.shape = {32, 1, 1, 1, 1}; }),
                 {name, "rank is 5"});
  expect_refusal("zero", with([](Tensor& t) { t.shape = {64, 0}; }), {name, "dimension 1 is 0"});
  expect_refusal("product",
                 with([](Tensor& t) { t.shape = {uint64_t{1} << 32, uint64_t{1} << 32}; }),
                 {name, "dimension 1 is 4294967296"});
  expect_refusal("wrapping product",
                 with([](Tensor& t) { t.shape = {uint64_t{1} << 33, uint64_t{1} << 31, 64}; }),
                 {name, "dimension"});
  expect_refusal("bytes", with([](Tensor& t) { t.shape = {64, uint64_t{1} << 56}; }),
                 {name, "bytes"});
  expect_refusal("type", with([](Tensor& t) { t.type = 12; }), {name, "type is 12"});
  expect_refusal("blocks", with([](Tensor& t) { t.shape = {33, 64}; }), {name, "33 elements"});
  expect_refusal("offset", with([](Tensor& t) { t.offset = 0; }), {name, "offset is 0"});
  expect_refusal("far offset", with([](Tensor& t) { t.offset = UINT64_MAX - 31; }),
                 {name, "offset is 18446744073709551584"});
  expect_refusal("name", with([](Tensor& t) { t.name = std::string(64, 'n'); }),
                 {"tensor name length is 64"});

  GgufBuilder file = tiny_model();
  file.tensors.push_back(file.tensors.front());
  expect_refusal("duplicate tensor", file, {"tensor 'token_embd_hadamard.weight' stands twice"});

  std::vector<uint8_t> bytes = tiny_model().bytes();
  bytes.resize(bytes.size() + 4096);
  expect_refusal("oversized", bytes, {"4096 bytes follow the last tensor"});
}

// The metadata and the tensors must agree.
void test_model() {
  const auto with_key = [](auto&& change) {
    GgufBuilder file = tiny_model();
    change(file);
    return file;
  };
  using G = GgufBuilder;
  struct Case {
    const char* key;
    uint32_t value;
    const char* part;
  };
  for (const Case& c : std::vector<Case>{
           {"llama.embedding_length", 0, "'llama.embedding_length' is 0"},
           {"llama.embedding_length", 128, "'token_embd_hadamard.weight' has shape 64 x 272"},
           {"llama.embedding_length", 1u << 20, "'llama.embedding_length' is 1048576"},
           {"llama.block_count", 2000000000, "'llama.block_count' is 2000000000"},
           {"llama.block_count", 4, "expected 4"},
           {"llama.feed_forward_length", 64,
            "is 96, not 1 nor a number that divides the site's size 64"},
           {"llama.attention.head_count", 0, "'llama.attention.head_count' is 0"},
           {"llama.attention.head_count_kv", 3, "does not divide the 4 query heads"},
           {"llama.attention.key_length", 17, "size of a head is 17"},
           {"llama.attention.key_length", 1u << 31, "'llama.attention.key_length' is 2147483648"},
           {"llama.context_length", 0, "'llama.context_length' is 0"},
           {"tokenizer.ggml.bos_token_id", 272, "'tokenizer.ggml.bos_token_id' is 272"}}) {
    expect_refusal(c.key, with_key([&c](G& f) { f.u32(c.key, c.value); }), {c.part});
  }
  expect_refusal("missing", with_key([](G& f) { f.erase("llama.block_count"); }),
                 {"'llama.block_count' is missing"});
  expect_refusal("key type", with_key([](G& f) { f.f32("llama.block_count", 3); }),
                 {"'llama.block_count' has type f32, expected u32"});
  expect_refusal("architecture", with_key([](G& f) { f.string("general.architecture", "bert"); }),
                 {"'general.architecture' is 'bert'"});
  expect_refusal("epsilon",
                 with_key([](G& f) { f.f32("llama.attention.layer_norm_rms_epsilon", 0); }),
                 {"layer_norm_rms_epsilon' is 0"});
  expect_refusal("rope", with_key([](G& f) { f.string("llama.rope.scaling.type", "magic"); }),
                 {"'llama.rope.scaling.type' is 'magic'"});
  expect_refusal("site bits", with_key([](G& f) { f.string("squat.v.bits", "5"); }),
                 {"'squat.v.bits' is '5'"});
  expect_refusal("head bits", with_key([](G& f) { f.string("squat.head_in.bits", "4:8"); }),
                 {"'squat.head_in.bits' is '4:8'"});
  expect_refusal("step count", with_key([](G& f) { f.f32_array("squat.q.step8", {1.0f}); }),
                 {"'squat.q.step8' has 1 elements, expected 3"});
  for (const float step : {0.0f, 0.1f, -1.0f, 3e-5f, 1e9f}) {
    expect_refusal("step", with_key([step](G& f) { f.f32_array("squat.q.step8", {1, 1, step}); }),
                   {"'squat.q.step8' element 2"});
  }
  CHECK(refusal(with_key([](G& f) { f.f32_array("squat.q.step4", {0, 1, 1}); }).bytes()).empty());
  expect_refusal("unused", with_key([](G& f) { f.f32_array("squat.v.step4", {0, 1, 1}); }),
                 {"'squat.v.step4' element 0"});
  expect_refusal("importance", with_key([](G& f) { f.string("squat.importance", "luck"); }),
                 {"'squat.importance' is 'luck'"});
  expect_refusal("thresholds", with_key([](G& f) { f.f32_array("squat.threshold", {1}); }),
                 {"'squat.threshold' has 1 elements"});
  expect_refusal("no ranks", with_key([](G& f) { f.string("squat.importance", "rarity"); }),
                 {"'squat.token_ranks' is missing"});
  expect_refusal("ranks", with_key([](G& f) {
                   f.string("squat.importance", "rarity");
                   f.u32_array("squat.token_ranks", {1, 2});
                 }),
                 {"'squat.token_ranks' has 2 elements, expected 272"});
  expect_refusal("rank", with_key([](G& f) {
                   f.string("squat.importance", "rarity");
                   std::vector<uint32_t> ranks(272);
                   ranks[3] = 272;
                   f.u32_array("squat.token_ranks", ranks);
                 }),
                 {"'squat.token_ranks' element 3 is 272, expected less than 272"});
  expect_refusal("tokens",
                 with_key([](G& f) { f.string_array("tokenizer.ggml.tokens", {"a", "b"}); }),
                 {"'tokenizer.ggml.tokens' has 2 elements", "272"});
  expect_refusal("merges",
                 with_key([](G& f) { f.string_array("tokenizer.ggml.merges", {"he llo!"}); }),
                 {"'tokenizer.ggml.merges' element 0"});

  const std::string normalizers = "squat.tokenizer.normalizers";
  for (const std::vector<std::string>& words :
       std::vector<std::vector<std::string>>{{"nfd"},
                                             {"nfc", "prepend"},
                                             {"replace", "a"},
                                             {"prepend", ""},
                                             {"prepend", std::string(65, 'x')}}) {
    expect_refusal("normalizers", with_key([&](G& f) { f.string_array(normalizers, words); }),
                   {"'squat.tokenizer.normalizers' is no list of nfc, nfkc, lowercase"});
  }
  expect_refusal("prefix", with_key([](G& f) { f.string("squat.tokenizer.prefix", "last"); }),
                 {"'squat.tokenizer.prefix' is 'last', expected 'first' or 'always'"});
  expect_refusal("pre", with_key([](G& f) { f.string("tokenizer.ggml.pre", "bloom"); }),
                 {"'tokenizer.ggml.pre' is 'bloom', expected one of gpt-2, smollm"});
  const auto added = [&](const std::vector<uint32_t>& tokens, const std::vector<uint32_t>& flags) {
    return with_key([&](G& f) {
      f.u32_array("squat.tokenizer.added_tokens", tokens);
      f.u32_array("squat.tokenizer.added_token_flags", flags);
    });
  };
  expect_refusal("added", added({1, 272}, {0, 0}), {"added_tokens' has token 272", "272 tokens"});
  expect_refusal("flags", added({1}, {32}), {"added_token_flags' has 32"});
  expect_refusal("flag count", added({1, 2}, {1}),
                 {"added_token_flags' has 1 elements, expected 2"});
  CHECK(refusal(added({1, 2}, {31, 0}).bytes()).empty());
  expect_refusal("no flags",
                 with_key([](G& f) { f.u32_array("squat.tokenizer.added_tokens", {1}); }),
                 {"'squat.tokenizer.added_token_flags' is missing"});
  const auto unigram = [&](const std::vector<double>& scores, bool unknown) {
    return with_key([&](G& f) {
      f.string("tokenizer.ggml.model", "t5");
      f.f64_array("squat.tokenizer.scores", scores);
      if (unknown) f.u32("tokenizer.ggml.unknown_token_id", 0);
    });
  };
  const double nan = std::numeric_limits<double>::quiet_NaN();
  expect_refusal("scores", unigram({1.0}, true), {"scores' has 1 elements, expected 272"});
  expect_refusal("no unknown", unigram(std::vector<double>(272), false),
                 {"'tokenizer.ggml.unknown_token_id' is missing"});
  expect_refusal("NaN", unigram(std::vector<double>(272, nan), true), {"is no finite number"});
  CHECK(refusal(unigram(std::vector<double>(272), true).bytes()).empty());
  expect_refusal("ends",
                 with_key([](G& f) { f.u32_array("squat.tokenizer.eos_token_ids", {2, 272}); }),
                 {"'squat.tokenizer.eos_token_ids' is 272"});

  expect_refusal("float matrix", with_key([](G& f) {
                   G::Tensor& t = f.tensor("blk.1.attn_output.weight");
                   t.type = 0;
                   t.data.assign(64 * 64 * 4, 0);
                 }),
                 {"'blk.1.attn_output.weight' has type F32"});
  expect_refusal("no matrix",
                 with_key([](G& f) { f.tensor("blk.1.attn_output.weight").name = "x"; }),
                 {"'blk.1.attn_output.weight' is missing"});
  expect_refusal("short norm", with_key([](G& f) { f.floats("output_norm.weight", {1, 2}); }),
                 {"'output_norm.weight'", "shape 2, expected F32 and 64"});
}

// What files of version 2 may have beyond the plain network; here layers of 64 elements, 96
// between.
void test_features() {
  using G = GgufBuilder;
  const auto with = [](auto&& change) {
    GgufBuilder file = tiny_model();
    change(file);
    return file;
  };
  expect_refusal("unknown feature",
                 with([](G& f) { f.string_array("squat.features", {"hadamard", "sparsity"}); }),
                 {"'squat.features' names 'sparsity'", "does not know"});
  CHECK(refusal(with([](G& f) {
                  f.string_array("squat.features", {"token_exponents", "token_steps", "hadamard",
                                                    "levels", "graph", "tokenizer"});
                }).bytes())
            .empty());
  expect_refusal("feature type", with([](G& f) { f.string("squat.features", "levels"); }),
                 {"'squat.features' has type string"});
  for (const auto& [feature, key] : std::vector<std::pair<std::string, std::string>>{
           {"token_exponents", "squat.attn_in.margin8"},
           {"hadamard", "squat.attn_in.hadamard"},
           {"levels", "squat.attn_in.levels4"}}) {
    std::vector<std::string> others = {"token_exponents", "hadamard", "levels"};
    others.erase(std::find(others.begin(), others.end(), feature));
    expect_refusal("unnamed feature", with([&](G& f) { f.string_array("squat.features", others); }),
                   {"key '" + key + "' is there", "does not name '" + feature + "'"});
  }
  expect_refusal("no features", with([](G& f) { f.erase("squat.features"); }),
                 {"'squat.attn_in.margin8' is there", "'squat.features' does not name"});

  for (const std::string width : {"8", "4"}) {
    const std::string q = "squat.q.margin" + width, k = "squat.k.margin" + width;
    expect_refusal("margin", with([&](G& f) { f.u32(q, 8); }),
                   {"'" + q + "' is 8, not from 0 to 7"});
    expect_refusal("margin type", with([&](G& f) { f.f32(k, 1); }),
                   {"'" + k + "' has type f32, expected u32"});
    expect_refusal("one margin", with([&](G& f) { f.erase(k); }), {"'" + k + "' is missing"});
    for (const std::string site : {"v", "probs"}) {
      const std::string key = "squat." + site + ".margin" + width;
      expect_refusal("margin", with([&](G& f) { f.u32(key, 0); }),
                     {"'" + key + "' is there", "no token_exponents"});
    }
  }
  expect_refusal("other width", with([](G& f) {
                   f.erase("squat.head_in.margin8");
                   f.u32("squat.head_in.margin4", 0);
                 }),
                 {"'squat.head_in.margin8' is missing"});

  const auto with_option = [](bool ModelOptions::* option) {
    return [=](auto&& change) {
      ModelOptions options;
      options.*option = true;
      GgufBuilder file = tiny_model(options);
      change(file);
      return file;
    };
  };
  const auto with_peaks = with_option(&ModelOptions::peaks);
  const std::string token_steps = "squat.token_steps";
  CHECK(refusal(with_peaks([](G&) {}).bytes()).empty());
  expect_refusal("other token steps", with_peaks([&](G& f) { f.string(token_steps, "median"); }),
                 {"'" + token_steps + "' is 'median', expected 'peak'"});
  expect_refusal("type of token steps", with_peaks([&](G& f) { f.u32(token_steps, 1); }),
                 {"'" + token_steps + "' has type u32"});
  expect_refusal("unnamed token steps", with([&](G& f) { f.string(token_steps, "peak"); }),
                 {"'" + token_steps + "' is there", "does not name 'token_steps'"});
  expect_refusal("peaks and exponents", with_peaks([](G& f) { f.u32("squat.q.margin8", 0); }),
                 {"'squat.q.margin8' is there", "no token_exponents"});
  expect_refusal("fine step", with_peaks([](G& f) {
                   f.f32_array("squat.probs.step8", {0.5f, 0.5f, 0.50048828125f});
                 }),
                 {"'squat.probs.step8' element 2", "more than 8 bits behind the point"});

  const auto with_base2 = with_option(&ModelOptions::base2);
  CHECK(refusal(with_base2([](G&) {}).bytes()).empty());
  expect_refusal("other softmax", with_base2([](G& f) { f.string("squat.softmax", "base10"); }),
                 {"'squat.softmax' is 'base10', expected 'base2'"});
  expect_refusal("unnamed softmax", with([](G& f) { f.string("squat.softmax", "base2"); }),
                 {"'squat.softmax' is there", "does not name 'softmax'"});
  expect_refusal("steps of codes",
                 with_base2([](G& f) { f.f32_array("squat.probs.step8", {0.5f, 0.5f, 0.5f}); }),
                 {"'squat.probs.step8' is there", "without steps"});

  const std::string center = "blk.1.attn_k_center";
  const auto with_center = [&](size_t size) {
    return with([&](G& f) { f.floats(center, std::vector<float>(size, 1.0f)); });
  };
  expect_refusal("unnamed center", with_center(32),
                 {"'" + center + "' is there", "does not name 'key_centers'"});
  GgufBuilder short_center = with_center(16);
  short_center.string_array("squat.features",
                            {"token_exponents", "hadamard", "key_centers", "levels"});
  expect_refusal("short center", short_center,
                 {"'" + center + "'", "shape 16, expected F32 and 32"});

  const std::string first = "squat.first_token";
  expect_refusal("unnamed first token", with([&](G& f) { f.string(first, "wide"); }),
                 {"'" + first + "' is there", "does not name 'first_token'"});
  expect_refusal("other first token", with([&](G& f) {
                   f.string(first, "float");
                   f.string_array("squat.features",
                                  {"token_exponents", "hadamard", "levels", "first_token"});
                 }),
                 {"'" + first + "' is 'float'", "expected 'wide'"});

  const std::string recent = "squat.recent_keys";
  expect_refusal("unnamed recent keys", with([&](G& f) { f.u32(recent, 16); }),
                 {"'" + recent + "' is there", "does not name 'recent_keys'"});
  expect_refusal("recent keys without peaks", with([&](G& f) {
                   f.u32(recent, 16);
                   f.string_array("squat.features",
                                  {"token_exponents", "hadamard", "levels", "recent_keys"});
                 }),
                 {"'" + recent + "' is there", "'squat.token_steps' is not 'peak'"});
  ModelOptions peaks;
  peaks.peaks = true;
  peaks.recent_keys = 65;
  expect_refusal("too many recent keys", tiny_model(peaks), {"'" + recent + "' is 65", "1 to 64"});

  for (const uint32_t block : {0u, 20u, 64u, 1u << 20}) {
    expect_refusal("block",
                   with([=](G& f) { f.u32_array("squat.mlp_mid.hadamard", {1, 2, block}); }),
                   {"'squat.mlp_mid.hadamard' element 2 is " + std::to_string(block),
                    "not 1 nor a number that divides the site's size 96"});
  }
  expect_refusal("block count", with([](G& f) { f.u32_array("squat.mlp_in.hadamard", {1, 2}); }),
                 {"'squat.mlp_in.hadamard' has 2 elements, expected 3"});
  expect_refusal("block type", with([](G& f) { f.u32("squat.mlp_in.hadamard", 2); }),
                 {"'squat.mlp_in.hadamard' has type u32"});
  for (const std::string site : {"q", "v", "probs"}) {
    const std::string key = "squat." + site + ".hadamard";
    expect_refusal("blocks", with([&](G& f) { f.u32_array(key, {2, 2, 2}); }),
                   {"'" + key + "' is there", "no hadamard"});
  }
  expect_refusal("blocks of k", with([](G& f) { f.u32_array("squat.k.hadamard", {16, 1, 32}); }),
                 {"'squat.k.hadamard' element 2 is 32", "divides the site's size 16"});
  expect_refusal("blocks of heads",
                 with([](G& f) { f.u32_array("squat.attn_out.hadamard", {64, 1, 8}); }),
                 {"'squat.attn_out.hadamard' element 2 is 8", "a multiple of 16 that divides"});
  expect_refusal("head's block", with([](G& f) { f.u32_array("squat.head_in.hadamard", {128}); }),
                 {"'squat.head_in.hadamard' element 0 is 128", "divides the site's size 64"});
  expect_refusal("head's count",
                 with([](G& f) { f.u32_array("squat.head_in.hadamard", {2, 2, 2}); }),
                 {"'squat.head_in.hadamard' has 3 elements, expected 1"});
  expect_refusal("other name",
                 with([](G& f) { f.u32_array("squat.attn_in.hadamard", {64, 2, 16}); }),
                 {"'blk.1.attn_q_hadamard.weight' is missing"});
  expect_refusal("old name", with([](G& f) { f.u32_array("squat.mlp_in.hadamard", {64, 1, 1}); }),
                 {"'blk.2.ffn_gate.weight' is missing"});
  expect_refusal("embedding's name", with([](G& f) {
                   f.tensor("token_embd_hadamard.weight").name = "token_embd.weight";
                 }),
                 {"'token_embd_hadamard.weight' is missing"});
  expect_refusal("embedding's old name",
                 with([](G& f) { f.u32_array("squat.head_in.hadamard", {1}); }),
                 {"'token_embd.weight' is missing"});
  ModelOptions untied;
  untied.tied = false;
  GgufBuilder own_head = tiny_model(untied);
  CHECK(refusal(own_head.bytes()).empty());
  own_head.tensor("output_hadamard.weight").name = "output.weight";
  expect_refusal("head's name", own_head, {"'token_embd_hadamard.weight' is missing"});

  const auto levels = [&](const std::string& site, auto&& change) {
    std::vector<int32_t> values;
    for (int i = 0; i < 48; i++) values.push_back(i % 16 * 17 - 128);
    change(values);
    return with([&](G& f) { f.i32_array("squat." + site + ".levels4", values); });
  };
  using Values = std::vector<int32_t>;
  CHECK(refusal(levels("mlp_in", [](Values&) {}).bytes()).empty());
  expect_refusal("level count", levels("mlp_in", [](Values& v) { v.pop_back(); }),
                 {"'squat.mlp_in.levels4' has 47 elements, expected 48"});
  expect_refusal("equal levels", levels("mlp_in", [](Values& v) { v[20] = v[19]; }),
                 {"'squat.mlp_in.levels4' element 20 is -77", "ascend"});
  expect_refusal("low level", levels("mlp_in", [](Values& v) { v[16] = -129; }),
                 {"'squat.mlp_in.levels4' element 16 is -129, not from -128 to 127"});
  expect_refusal("high level", levels("mlp_in", [](Values& v) { v[47] = 128; }),
                 {"'squat.mlp_in.levels4' element 47 is 128, not from -128 to 127"});
  expect_refusal("zeros", levels("mlp_in", [](Values& v) { std::fill(v.begin(), v.end(), 0); }),
                 {"'squat.mlp_in.levels4' element 1 is 0", "ascend"});
  expect_refusal("unused levels", levels("q", [](Values&) {}),
                 {"'squat.q.levels4' element 0 is -128, expected 0: layer 0 has no 4-bit tokens"});
  expect_refusal("level type", with([](G& f) { f.f32_array("squat.q.levels4", {1}); }),
                 {"'squat.q.levels4'", "f32"});
  expect_refusal("unused levels of keys", levels("k", [](Values&) {}),
                 {"'squat.k.levels4' element 0 is -128, expected 0: layer 0 has no 4-bit tokens"});
  CHECK(refusal(levels("v", [](Values&) {}).bytes()).empty());
  expect_refusal("levels of values", levels("v", [](Values& v) { v[1] = v[0]; }),
                 {"'squat.v.levels4' element 1 is -128", "ascend"});
  for (const char* site : {"probs", "head_in"}) {
    expect_refusal("levels", levels(site, [](Values&) {}),
                   {"'squat." + std::string(site) + ".levels4' is there", "no levels"});
  }
  ModelOptions wide;
  wide.activations = "8";
  GgufBuilder file = tiny_model(wide);
  file.i32_array("squat.q.levels4", Values(48, 0));
  CHECK(refusal(file.bytes()).empty());
  file.i32_array("squat.q.levels4", Values(48, 1));
  expect_refusal("levels of 8 bits", file, {"'squat.q.levels4' element 0 is 1, expected 0"});
}

// Version 1 transforms the input of the down projection, in all layers alike, and has no list.
void test_version_1() {
  ModelOptions options;
  options.version = 1;
  for (const uint32_t block : {0u, 20u, 1u << 20}) {
    GgufBuilder file = tiny_model(options);
    file.u32("squat.mlp_mid.hadamard", block);
    expect_refusal("hadamard", file,
                   {"'squat.mlp_mid.hadamard' is " + std::to_string(block),
                    "not 1 nor a number that divides the site's size 96"});
  }
  GgufBuilder file = tiny_model(options);
  file.u32("squat.mlp_mid.hadamard", 2);
  expect_refusal("name", file, {"'blk.0.ffn_down_hadamard.weight' is missing"});
  for (int layer = 0; layer < options.layers; layer++) {
    const std::string name = "blk." + std::to_string(layer) + ".ffn_down";
    file.tensor(name + ".weight").name = name + "_hadamard.weight";
  }
  CHECK(refusal(file.bytes()).empty());
  // Its bias has the other name too; in version 2 it has its own.
  const std::vector<float> short_bias = {1.0f};
  GgufBuilder first = file, second = tiny_model();
  first.floats("blk.0.ffn_down_hadamard.bias", short_bias);
  expect_refusal("bias", first, {"'blk.0.ffn_down_hadamard.bias'", "shape 1, expected F32"});
  second.floats("blk.0.ffn_down.bias", short_bias);
  expect_refusal("bias", second, {"'blk.0.ffn_down.bias'", "shape 1, expected F32"});
  file.u32("squat.q.margin8", 1);
  expect_refusal("margin", file, {"'squat.q.margin8' is there", "does not name"});
}

// A step for each row, in whatever form; in version 1 one for all rows.
void test_steps() {
  // One block of many with another scale: in a product's matrix, and in embeddings that are none.
  ModelOptions options;
  GgufBuilder file = tiny_model(options);
  file.tensor("blk.1.ffn_down.weight").data[18 * (25 * 3 + 2)]++;
  expect_refusal("scale", file, {"tensor 'blk.1.ffn_down.weight' row 25 block 2", "the row's"});
  options.tied = false;
  file = tiny_model(options);
  file.tensor("token_embd.weight").data[34 * (2 * 2 + 1) + 1]++;
  expect_refusal("embedding scale", file, {"tensor 'token_embd.weight' row 2 block 1"});
  options.gpt2 = true;
  file = tiny_model(options);
  file.tensor("position_embd.weight").data[34 * 5 + 1]++;
  expect_refusal("position scale", file, {"tensor 'position_embd.weight' row 2 block 1"});
  for (const uint16_t scale : {0x0000, 0x8400, 0x7c00, 0x7e00, 0x0001}) {
    file = tiny_model();
    uint8_t* row = file.tensor("blk.1.ffn_up.weight").data.data() + 7 * 2 * 18;
    std::memcpy(row, &scale, sizeof scale);
    std::memcpy(row + 18, &scale, sizeof scale);
    expect_refusal(
        "bad scale", file,
        {"tensor 'blk.1.ffn_up.weight' row 7 block 0", std::to_string(scale), "no step"});
  }

  ModelOptions first;
  first.version = 1;
  file = tiny_model(first);
  CHECK(refusal(file.bytes()).empty());
  for (int block : {0, 1}) file.tensor("blk.1.ffn_up.weight").data[18 * (2 * 9 + block)]++;
  expect_refusal("version 1", file, {"'blk.1.ffn_up.weight' row 9 block 0", "the tensor's"});

  // Tensors of bytes, with their steps beside them.
  ModelOptions bytes;
  bytes.ffn = 41;
  const std::string step = "blk.2.ffn_down.weight.step";
  file = tiny_model(bytes);
  CHECK(refusal(file.bytes()).empty());
  for (const float value : {0.0f, 0.1f, -1.0f, 3e-5f, 1e9f, NAN}) {
    file = tiny_model(bytes);
    std::memcpy(file.tensor(step).data.data() + 63 * sizeof value, &value, sizeof value);
    expect_refusal("bytes", file, {"tensor '" + step + "' element 63", "2^-14"});
  }
  file.floats(step, {0.5f});
  expect_refusal("one step", file, {"tensor '" + step + "'", "1 elements", "expected F32", "64"});
  file.tensor(step).name = "x";
  expect_refusal("no steps", file, {"'blk.2.ffn_down.weight' is missing"});
  first.ffn = 41;
  file = tiny_model(first);
  CHECK(refusal(file.bytes()).empty());
  file.floats(step, std::vector<float>(64, 0.5f));
  expect_refusal("many steps", file, {"tensor '" + step + "'", "64 elements", "and 1"});
}

// A file that ends early is refused wherever it ends.
void test_truncation() {
  const std::vector<uint8_t> bytes = tiny_model().bytes();
  for (size_t size = 0; size < bytes.size(); size += size < 9000 ? 1 : 997) {
    const std::vector<uint8_t> cut(bytes.begin(),
                                   bytes.begin() + static_cast<std::ptrdiff_t>(size));
    if (!CHECK(!refusal(cut).empty())) std::fprintf(stderr, "  cut at %zu\n", size);
  }
}

// Random damage to the structure of a file: nothing to check but that it comes back.
void test_graph() {
  using G = GgufBuilder;
  ModelOptions llama, gpt2;
  llama.described = gpt2.described = gpt2.gpt2 = true;
  CHECK(refusal(tiny_model(llama).bytes()).empty());
  CHECK(refusal(tiny_model(gpt2).bytes()).empty());
  const auto with = [](ModelOptions options, auto&& change) {
    GgufBuilder file = tiny_model(options);
    change(file);
    return file;
  };
  const auto refused = [&](const char* what, auto&& change, const std::string& part) {
    expect_refusal(what, with(llama, change), {part});
  };
  // Another architecture is a graph like this one.
  CHECK(refusal(with(gpt2, [](G& f) { f.erase("squat.graph.windows"); }).bytes()).empty());
  refused(
      "feature",
      [](G& f) { f.string_array("squat.features", {"token_exponents", "hadamard", "levels"}); },
      "but 'squat.features' does not name 'graph'");
  refused(
      "unknown", [](G& f) { f.u32("squat.graph.experts", 8); },
      "'squat.graph.experts' is none that this engine knows");
  refused(
      "activation", [](G& f) { f.string("squat.graph.activation", "relu"); },
      "'squat.graph.activation' is 'relu', expected one of 'silu', 'gelu_tanh', 'gelu'");
  refused(
      "norm", [](G& f) { f.string("squat.graph.norm", "batch"); }, "'squat.graph.norm' is 'batch'");
  refused(
      "pairs", [](G& f) { f.string("squat.graph.pairs", "thirds"); }, "'thirds', expected one of");
  refused(
      "windows", [](G& f) { f.u32_array("squat.graph.windows", {1, 2}); },
      "'squat.graph.windows' has 2 elements, expected 3");
  refused(
      "window", [](G& f) { f.u32_array("squat.graph.windows", {1, 1u << 31, 2}); }, "2147483648");
  refused(
      "rotation", [](G& f) { f.u32_array("squat.graph.rotation", {0, 3, 1}); }, "is 3, not from 0");
  refused(
      "second base", [](G& f) { f.erase("squat.graph.second_base"); },
      "'squat.graph.second_base' is missing");
  for (const char* scale :
       {"embedding_scale", "attention_scale", "residual_scale", "logit_divisor"}) {
    const std::string key = std::string("squat.graph.") + scale;
    for (const float value : {0.0f, -1.0f, INFINITY, NAN}) {
      refused("scale", [&](G& f) { f.f32(key, value); }, "'" + key + "' is ");
    }
  }
  refused(
      "rotated", [](G& f) { f.u32("llama.rope.dimension_count", 18); }, "dimension_count' is 18");
  refused("head norm", [](G& f) { f.floats("blk.1.attn_q_norm.weight", {1, 2}); }, "attn_q_norm");
  refused(
      "parallel", [](G& f) { f.boolean("squat.graph.parallel", true); }, "but layers are parallel");
  expect_refusal("parallel norm",
                 with(gpt2, [](G& f) { f.floats("blk.0.post_ffw_norm.weight", {1}); }),
                 {"post_ffw_norm"});
  // Convolutions.
  ModelOptions convolutions = llama;
  convolutions.convolutions = true;
  CHECK(refusal(tiny_model(convolutions).bytes()).empty());
  const auto not_convolved = [&](const char* what, auto&& change, const std::string& part) {
    expect_refusal(what, with(convolutions, change), {part});
  };
  const std::string taps = "squat.graph.convolutions", heads = "llama.attention.head_count_kv";
  not_convolved(
      "taps", [&](G& f) { f.u32_array(taps, {3, 0, 65}); }, "element '2' is 65, not from 0 to 64");
  not_convolved("taps", [&](G& f) { f.u32_array(taps, {3, 0}); }, "has 2 elements, expected 3");
  not_convolved(
      "taps", [&](G& f) { f.u32_array(taps, {4, 0, 3}); },
      "'blk.0.shortconv.conv.weight' has type F32 and shape 3 x 64, expected F32 and 4 x 64");
  not_convolved(
      "attention", [&](G& f) { f.u32_array(taps, {3, 3, 3}); }, "leaves no layer with attention");
  not_convolved("no taps", [&](G& f) { f.erase(taps); }, "'" + heads + "' has type array");
  not_convolved(
      "heads", [&](G& f) { f.u32_array(heads, {1, 2, 0}); }, "element 0 is 1, expected 2");
  not_convolved("heads", [&](G& f) { f.u32(heads, 2); }, "'" + heads + "' has type u32");
  for (const char* part : {"in_proj", "out_proj", "conv"}) {
    const std::string name = std::string("blk.2.shortconv.") + part;
    const std::string end = part[0] == 'i' && hadamard_blocks(3, 64)[2] > 1 ? "_hadamard" : "";
    not_convolved(
        "tensor", [&](G& f) { f.tensor(name + end + ".weight").name = "x"; },
        "'" + name + end + ".weight' is missing");
  }
  // One of the norms has to be there.
  const auto renamed = [](G& f) { f.tensor("blk.2.attn_norm.weight").name = "other"; };
  CHECK(refusal(with(llama, renamed).bytes()).empty());
  expect_refusal("no norm", with(ModelOptions{}, renamed), {"'blk.2.attn_norm.weight' is missing"});
}

void test_damage() {
  std::mt19937 random(7);
  for (const bool gpt2 : {false, true}) {
    ModelOptions options;
    options.gpt2 = gpt2;
    options.version = gpt2 ? 1 : 2;
    options.described = !gpt2;
    options.layers = 1;
    const std::vector<uint8_t> bytes = tiny_model(options).bytes();
    for (int round = 0; round < 1500; round++) {
      std::vector<uint8_t> damaged = bytes;
      const int changes = 1 + static_cast<int>(random() % 4);
      for (int i = 0; i < changes; i++) {
        // Mostly the metadata: the codes may be anything anyway.
        const size_t range = random() % 8 == 0 ? damaged.size() : 12000;
        damaged[random() % range] = static_cast<uint8_t>(random());
      }
      LLVMFuzzerTestOneInput(damaged.data(), damaged.size());
    }
  }
}

}  // namespace

int main() {
  CHECK(refusal(tiny_model().bytes()).empty());
  ModelOptions gpt2;
  gpt2.gpt2 = true;
  CHECK(refusal(tiny_model(gpt2).bytes()).empty());
  test_values();
  test_header();
  test_metadata();
  test_tensors();
  test_model();
  test_features();
  test_graph();
  test_version_1();
  test_steps();
  test_truncation();
  test_damage();
  return squat::test::report("test_gguf");
}
