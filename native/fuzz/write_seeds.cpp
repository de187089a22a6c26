// Writes what fuzzing begins with:
//
//     write_seeds FOLDER
//
// FOLDER/gguf has valid models of every kind, and of one of them a file for each fault that
// GGUF readers have had; FOLDER/session saved sessions, each behind a byte that says of which
// model.
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "api/engine.h"
#include "small_models.h"

namespace {

namespace fs = std::filesystem;
using squat::test::GgufBuilder;
using squat::test::ModelOptions;

void write(const fs::path& path, const std::vector<uint8_t>& bytes) {
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(bytes.data()),
             static_cast<std::streamsize>(bytes.size()));
}

void write_models(const fs::path& folder) {
  int count = 0;
  for (const ModelOptions& options : squat::test::small_variants()) {
    write(folder / ("valid-" + std::to_string(count++)), squat::test::tiny_model(options).bytes());
  }
}

void write_faults(const fs::path& folder) {
  using G = GgufBuilder;
  const GgufBuilder sound = squat::test::tiny_model(squat::test::small_variants()[1]);
  const auto with = [&](const char* name, auto&& change) {
    GgufBuilder file = sound;
    change(file, file.tensor("blk.1.ffn_up.weight"));
    write(folder / (std::string("fault-") + name), file.bytes());
  };
  using Tensor = G::Tensor;
  constexpr uint64_t kOne = 1;
  with("product-wraps", [](G&, Tensor& t) { t.shape = {kOne << 33, kOne << 31, 64}; });
  with("product-is-huge", [](G&, Tensor& t) { t.shape = {kOne << 32, kOne << 32}; });
  with("bytes-wrap", [](G&, Tensor& t) { t.shape = {32, kOne << 56}; });
  with("sum-wraps", [](G&, Tensor& t) { t.shape = {32, (kOne << 63) / 9}; });
  with("offset-is-far", [](G&, Tensor& t) { t.offset = UINT64_MAX - 31; });
  with("type-is-unknown", [](G&, Tensor& t) { t.type = 99; });
  with("alignment-is-huge", [](G& f, Tensor&) { f.u32("general.alignment", 1u << 31); });
  with("alignment-is-zero", [](G& f, Tensor&) { f.u32("general.alignment", 0); });
  with("array-is-huge", [](G& f, Tensor&) { f.set("evil", G::array_header(8, kOne << 61)); });
  with("array-of-arrays", [](G& f, Tensor&) {
    f.set("evil", G::array_header(9, 1) + G::array_header(9, 1) + G::array_header(4, 0));
  });
  with("element-type", [](G& f, Tensor&) { f.set("evil", G::array_header(99, 1)); });
  with("string-is-huge",
       [](G& f, Tensor&) { f.set("evil", G::raw<uint32_t>(8) + G::raw(UINT64_MAX)); });
  with("context-is-huge", [](G& f, Tensor&) { f.u32("llama.context_length", UINT32_MAX); });
  with("layers-are-many", [](G& f, Tensor&) { f.u32("llama.block_count", UINT32_MAX); });
  with("wrong-kind", [](G& f, Tensor&) { f.string("llama.block_count", "two"); });
}

void write_sessions(const fs::path& folder) {
  const std::vector<std::vector<uint8_t>> files = squat::test::session_models();
  for (size_t i = 0; i < files.size(); i++) {
    squat::Engine engine(files[i].data(), files[i].size(), "seed", 1, 0);
    const std::vector<int32_t> tokens = squat::test::random_tokens(12);
    for (const size_t length : {size_t{0}, size_t{1}, size_t{12}}) {
      engine.session().rewind(0);
      engine.session().eval(tokens.data(), length, 0, nullptr);
      std::vector<uint8_t> bytes = engine.session().save(engine.identity());
      bytes.insert(bytes.begin(), static_cast<uint8_t>(i));
      write(folder / (std::to_string(i) + "-" + std::to_string(length)), bytes);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: write_seeds FOLDER\n");
    return 2;
  }
  const fs::path folder = argv[1];
  for (const char* part : {"gguf", "session"}) fs::create_directories(folder / part);
  write_models(folder / "gguf");
  write_faults(folder / "gguf");
  write_sessions(folder / "session");
}
