// Text to tokens and back, from the tokenizer.ggml.* keys of a model file.
//
// Both kinds are byte-pair encoding: pieces of text start as single symbols, and the adjacent pair
// with the lowest merge rank is joined until no pair has one. They differ in what a symbol is:
//   gpt2   bytes, after cutting the text with GPT-2's pattern of words, numbers and punctuation;
//   llama  characters (SentencePiece style: spaces are U+2581, the text is one piece), where a
//          character outside the vocabulary falls back to its bytes <0x00> .. <0xFF>.
// The result equals that of Hugging Face tokenizers for the tokenizer.json that the file was
// exported with.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "file/gguf.h"

namespace squat {

class Tokenizer {
 public:
  // The views into the file must outlive the object. Throws Error(SQUAT_ERROR_FORMAT).
  Tokenizer(const Gguf& file, uint32_t n_vocab);

  std::vector<int32_t> encode(std::string_view text) const;

  // The bytes that a token stands for; none for special tokens. `token` must be in range.
  std::string_view piece(int32_t token) const { return pieces_[static_cast<size_t>(token)]; }

  // The text of a whole sequence: the pieces, less the space that encode() put in front.
  std::string decode(const int32_t* tokens, size_t n) const;

 private:
  enum class Kind { kGpt2, kLlama };
  enum TokenType : int32_t { kNormal = 1, kUnknown = 2, kControl = 3, kUserDefined = 4, kByte = 6 };
  struct Merge {
    uint32_t rank;
    int32_t token;
  };

  void read_vocabulary(const Gguf& file, uint32_t n_vocab);
  void read_merges(const Gguf& file);
  // The added token at the beginning of `text`, the longest if several match, or -1.
  int32_t added_token_at(std::string_view text) const;
  void encode_text(std::string_view text, std::vector<int32_t>* out) const;
  void encode_gpt2(const std::u32string& text, std::vector<int32_t>* out) const;
  void encode_llama(const std::u32string& text, std::vector<int32_t>* out) const;
  void merge(std::vector<int32_t>* symbols) const;

  Kind kind_;
  bool nfkc_ = false;
  bool split_digits_ = false;
  bool add_space_prefix_ = false;
  bool add_bos_ = false;
  int32_t bos_ = -1;
  int32_t unknown_ = -1;
  std::vector<std::string> pieces_;
  std::unordered_map<std::string_view, int32_t> ids_;  // text as it stands in the file
  std::unordered_map<uint64_t, Merge> merges_;         // (left << 32 | right)
  std::vector<std::vector<int32_t>> added_;            // by first byte, longest first
  int32_t byte_ids_[256];
  std::vector<std::string_view> added_texts_;  // by id
};

}  // namespace squat
