// One loaded model with one session: what a squat_engine handle points to.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/mapped_file.h"
#include "base/thread_pool.h"
#include "file/gguf.h"
#include "graph/model.h"
#include "graph/session.h"
#include "kernels/kernels.h"
#include "text/tokenizer.h"

namespace squat {

class Engine {
 public:
  // See squat_load. Throws Error.
  Engine(const std::string& path, uint32_t threads, uint32_t context);
  // A file that lies in memory, which must outlive the engine; `name` stands in messages.
  Engine(const uint8_t* data, size_t size, const std::string& name, uint32_t threads,
         uint32_t context);

  const Gguf& file() const { return file_; }
  const Model& model() const { return model_; }
  Session& session() { return session_; }
  const Session& session() const { return session_; }
  // Made at the first call, so that whoever brings tokens does not pay for it. Throws Error.
  const Tokenizer& tokenizer();

  // Tells the model's file from others; made from all of it at the first call.
  uint64_t identity();

  const std::string& kernels() const { return kernels_; }
  const char* isa() const { return choice_.isa->name; }
  int threads() const { return threads_.size(); }
  size_t file_bytes() const { return file_bytes_; }
  int32_t bos_token() const { return bos_token_; }
  // Any of these ends an answer; the first one is the tokenizer's.
  const std::vector<int32_t>& eos_tokens() const { return eos_tokens_; }

 private:
  Engine(std::unique_ptr<MappedFile> mapping, const uint8_t* data, size_t size,
         const std::string& name, uint32_t threads, uint32_t context);

  std::unique_ptr<MappedFile> mapping_;  // null: the file lies in the caller's memory
  const uint8_t* bytes_;
  size_t file_bytes_;
  Gguf file_;
  kernels::Choice choice_;
  ThreadPool threads_;
  Model model_;
  Session session_;
  std::unique_ptr<Tokenizer> tokenizer_;
  std::optional<uint64_t> identity_;
  std::string kernels_;
  int32_t bos_token_ = -1;
  std::vector<int32_t> eos_tokens_;
};

}  // namespace squat
