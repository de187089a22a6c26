// Text to tokens and back, from the tokenizer.ggml.* keys of a model file.
//
// Added tokens are taken out of the text; what lies between is normalized (normalizer.h) and cut
// into pieces. Two kinds are byte-pair encoding: a piece starts as single symbols, and the adjacent
// pair with the lowest merge rank is joined until no pair has one. They differ in what a symbol is:
//   gpt2   bytes, after cutting the text by a pattern of words and numbers (pre_tokenizer.h);
//   llama  characters (SentencePiece style: spaces are U+2581, the text is one piece), where a
//          character outside the vocabulary falls back to its bytes <0x00> .. <0xFF>.
// The third kind, t5, is as llama, but its piece is cut by a unigram language model (unigram.h).
// The result equals that of Hugging Face tokenizers for the tokenizer.json that the file was
// exported with.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "added_tokens.h"
#include "file/gguf.h"
#include "normalizer.h"
#include "pre_tokenizer.h"
#include "unigram.h"

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
  enum class Kind { kGpt2, kLlama, kUnigram };
  enum class Prefix { kNever, kFirst, kAlways };
  enum TokenType : int32_t {
    kNormal = 1,
    kUnknown = 2,
    kControl = 3,
    kUserDefined = 4,
    kUnused = 5,
    kByte = 6
  };
  enum Flag : uint32_t {  // of added tokens
    kSingleWord = 1,
    kLstrip = 2,
    kRstrip = 4,
    kNormalized = 8,  // it is found in the normalized text, and normalized itself
    kOutside = 16,    // the merges know nothing of it
    kFlagsEnd = 32
  };
  struct Merge {
    uint32_t rank;
    int32_t token;
  };

  void read_normalizer(const Gguf& file);
  void read_vocabulary(const Gguf& file, uint32_t n_vocab);
  std::vector<uint32_t> read_flags(const Gguf& file, uint32_t n_vocab) const;
  void add_token(const std::u32string& text, int32_t id, uint32_t flags);
  int byte_of(std::string_view text, int32_t type) const;
  std::string text_of(const std::u32string& token, int32_t type) const;
  void read_merges(const Gguf& file);
  void read_scores(const Gguf& file);
  // What lies between two added tokens; `first`: the text begins with it.
  void encode_text(std::u32string_view text, bool first, std::vector<int32_t>* out) const;
  void encode_piece(std::u32string_view piece, std::vector<int32_t>* out) const;
  // What is missing in the vocabulary by its bytes, if all of them are tokens.
  bool encode_bytes(std::string_view text, std::vector<int32_t>* out) const;
  void encode_unigram(std::string_view text, std::vector<int32_t>* out) const;
  void merge(std::vector<int32_t>* symbols) const;

  Kind kind_;
  Normalizer normalizer_;
  const PreTokenizer* pre_tokenizer_ = nullptr;  // null: a text is one piece
  Prefix prefix_ = Prefix::kNever;  // where a space is put in front of a text without one
  bool strips_space_ = false;       // decode() does, from the beginning of a text
  bool add_bos_ = false;
  int32_t bos_ = -1;
  int32_t unknown_ = -1;
  std::vector<std::string> pieces_;
  std::unordered_map<std::string_view, int32_t> ids_;  // text as it stands in the file
  std::unordered_map<uint64_t, Merge> merges_;         // (left << 32 | right)
  AddedTokens added_;                                  // found in the text as it is
  AddedTokens added_normalized_;                       // found in the normalized text
  int32_t byte_ids_[256];
  Unigram unigram_;
};

}  // namespace squat
