// What a squat_engine handle points to: a session, and a loaded model that other engines may share.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
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

// A model's file and its packed weights. Once it is loaded nothing changes: any number of threads
// may read it.
struct Loaded {
  // Of a mapped file, or of one that lies in memory. Throws Error.
  Loaded(std::unique_ptr<MappedFile> mapped, const uint8_t* data, size_t size,
         const std::string& name, ThreadPool& threads);

  // Made at the first call, so that whoever brings tokens does not pay for it. Throws Error.
  const Tokenizer& tokenizer() const;
  // Tells the model's file from others; made from all of it at the first call.
  uint64_t identity() const;

  const std::unique_ptr<MappedFile> mapping;  // null: the file lies in the caller's memory
  const uint8_t* const bytes;
  const size_t file_bytes;
  const Gguf file;
  const kernels::Choice choice;
  const Model model;
  const std::string kernels;
  const int32_t bos_token;
  // Any of these ends an answer; the first one is the tokenizer's.
  const std::vector<int32_t> eos_tokens;

 private:
  mutable std::mutex mutex_;
  mutable std::unique_ptr<const Tokenizer> tokenizer_;
  mutable std::optional<uint64_t> identity_;
};

class Engine {
 public:
  // See squat_load. Throws Error.
  Engine(const std::string& path, uint32_t threads, uint32_t context);
  // A file that lies in memory, which must outlive the engine; `name` stands in messages.
  Engine(const uint8_t* data, size_t size, const std::string& name, uint32_t threads,
         uint32_t context);
  // See squat_share. Throws Error.
  Engine(const Engine& other, uint32_t threads, uint32_t context);

  // See squat_share.
  bool shares_model(const Engine& other) const { return loaded_ == other.loaded_; }

  const Gguf& file() const { return loaded_->file; }
  const Model& model() const { return loaded_->model; }
  Session& session() { return session_; }
  const Session& session() const { return session_; }
  const Tokenizer& tokenizer() const { return loaded_->tokenizer(); }
  uint64_t identity() const { return loaded_->identity(); }

  const std::string& kernels() const { return loaded_->kernels; }
  const char* isa() const { return loaded_->choice.isa->name; }
  int threads() const { return threads_.size(); }
  size_t file_bytes() const { return loaded_->file_bytes; }
  int32_t bos_token() const { return loaded_->bos_token; }
  const std::vector<int32_t>& eos_tokens() const { return loaded_->eos_tokens; }

 private:
  Engine(std::unique_ptr<MappedFile> mapping, const uint8_t* data, size_t size,
         const std::string& name, uint32_t threads, uint32_t context);

  ThreadPool threads_;
  std::shared_ptr<const Loaded> loaded_;
  Session session_;
};

}  // namespace squat
