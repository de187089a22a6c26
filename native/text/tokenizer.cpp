#include "tokenizer.h"

#include <algorithm>
#include <cmath>
#include <queue>

#include "base/error.h"
#include "unicode.h"

namespace squat {

namespace {

constexpr char32_t kLowerOneEighthBlock = 0x2581;  // SentencePiece's visible space

// GPT-2's alphabet: each byte as a printable character.
char32_t byte_to_character(uint8_t byte) {
  const auto printable = [](uint32_t b) {
    return (b >= 0x21 && b <= 0x7e) || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
  };
  if (printable(byte)) return byte;
  char32_t character = 0x100;
  for (uint32_t b = 0; b < byte; b++) character += !printable(b);
  return character;
}

// Bytes, written in that alphabet.
std::string spelling(std::string_view bytes) {
  static const std::vector<std::string> table = [] {
    std::vector<std::string> characters(256);
    for (int byte = 0; byte < 256; byte++) {
      append_utf8(byte_to_character(static_cast<uint8_t>(byte)), &characters[byte]);
    }
    return characters;
  }();
  std::string out;
  for (const char byte : bytes) out += table[static_cast<uint8_t>(byte)];
  return out;
}

// The bytes that a token of GPT-2's alphabet spells; false if it has any other character.
bool spell_bytes(std::u32string_view token, std::string* bytes) {
  static const std::vector<int> table = [] {
    std::vector<int> characters(0x180, -1);
    for (int byte = 0; byte < 256; byte++) {
      characters[byte_to_character(static_cast<uint8_t>(byte))] = byte;
    }
    return characters;
  }();
  bytes->clear();
  for (const char32_t character : token) {
    if (character >= table.size() || table[character] < 0) return false;
    bytes->push_back(static_cast<char>(table[character]));
  }
  return true;
}

// The value of "<0x41>", or -1.
int parse_byte_token(std::string_view text) {
  if (text.size() != 6 || text.substr(0, 3) != "<0x" || text[5] != '>') return -1;
  int value = 0;
  for (const char c : text.substr(3, 2)) {
    const int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
    if (digit < 0) return -1;
    value = value * 16 + digit;
  }
  return value;
}

uint64_t pair_key(int32_t left, int32_t right) {
  return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
}

[[noreturn]] void refuse(const Gguf& file, std::string_view key, const std::string& problem) {
  throw Error(SQUAT_ERROR_FORMAT, file.name() + ": key '" + std::string(key) + "' " + problem);
}

std::string quoted(std::string_view text) { return "'" + std::string(text) + "'"; }

bool flag(const Gguf& file, std::string_view key) { return file.has(key) && file.boolean(key); }

}  // namespace

Tokenizer::Tokenizer(const Gguf& file, uint32_t n_vocab) {
  constexpr std::string_view kModel = "tokenizer.ggml.model", kPre = "tokenizer.ggml.pre",
                             kBos = "tokenizer.ggml.bos_token_id",
                             kAddBos = "tokenizer.ggml.add_bos_token";
  const std::string_view model = file.string(kModel);
  if (model != "gpt2" && model != "llama" && model != "t5") {
    refuse(file, kModel, "is " + quoted(model) + ", expected 'gpt2', 'llama' or 't5'");
  }
  kind_ = model == "gpt2" ? Kind::kGpt2 : model == "llama" ? Kind::kLlama : Kind::kUnigram;
  if (kind_ == Kind::kGpt2) {
    const std::string_view pre = file.string(kPre);
    pre_tokenizer_ = find_pre_tokenizer(pre);
    if (pre_tokenizer_ == nullptr) {
      refuse(file, kPre, "is " + quoted(pre) + ", expected one of " + pre_tokenizer_names());
    }
  }
  add_bos_ = flag(file, kAddBos);
  const auto token_id = [&](std::string_view key) {
    if (!file.has(key)) return -1;
    const uint32_t id = file.u32(key);
    if (id >= n_vocab) {
      refuse(file, key,
             "is " + std::to_string(id) + ", but the vocabulary has " + std::to_string(n_vocab) +
                 " tokens");
    }
    return static_cast<int32_t>(id);
  };
  bos_ = token_id(kBos);
  unknown_ = token_id("tokenizer.ggml.unknown_token_id");
  if (add_bos_ && bos_ < 0) {
    refuse(file, kAddBos, "is true, but key " + quoted(kBos) + " is missing");
  }
  read_normalizer(file);
  read_vocabulary(file, n_vocab);
  if (kind_ == Kind::kUnigram) {
    read_scores(file);
  } else {
    read_merges(file);
  }
}

// A file without squat.tokenizer.normalizers, as earlier versions wrote it, says by other keys what
// it can say.
void Tokenizer::read_normalizer(const Gguf& file) {
  constexpr std::string_view kSteps = "squat.tokenizer.normalizers",
                             kPrefix = "squat.tokenizer.prefix";
  const bool llama = kind_ == Kind::kLlama;
  const bool space = flag(file, "tokenizer.ggml.add_space_prefix");
  strips_space_ = kind_ != Kind::kGpt2 && space;
  if (file.has(kSteps)) {
    if (!Normalizer::parse(file.string_array(kSteps), &normalizer_)) {
      refuse(file, kSteps, "is no list of nfc, nfkc, lowercase, prepend TEXT and replace TEXT BY");
    }
  } else {
    if (flag(file, "squat.tokenizer.nfkc")) normalizer_.add(Normalizer::Kind::kNfkc);
    if (llama && space) normalizer_.add(Normalizer::Kind::kPrepend, U" ");
    if (llama) normalizer_.add(Normalizer::Kind::kReplace, U" ", {kLowerOneEighthBlock});
  }
  if (file.has(kPrefix)) {
    const std::string_view prefix = file.string(kPrefix);
    if (prefix != "first" && prefix != "always") {
      refuse(file, kPrefix, "is " + quoted(prefix) + ", expected 'first' or 'always'");
    }
    prefix_ = prefix == "first" ? Prefix::kFirst : Prefix::kAlways;
  } else if (kind_ == Kind::kGpt2 && space) {
    prefix_ = Prefix::kAlways;
  }
}

// By id. squat.tokenizer.added_tokens has the ids of the tokens with flags, .added_token_flags the
// flags of each.
std::vector<uint32_t> Tokenizer::read_flags(const Gguf& file, uint32_t n_vocab) const {
  constexpr std::string_view kAdded = "squat.tokenizer.added_tokens",
                             kFlags = "squat.tokenizer.added_token_flags";
  std::vector<uint32_t> flags(n_vocab, 0);
  if (!file.has(kAdded)) return flags;
  const std::vector<uint32_t> ids = file.u32_array(kAdded), values = file.u32_array(kFlags);
  if (ids.size() != values.size()) {
    refuse(file, kFlags,
           "has " + std::to_string(values.size()) + " elements, expected " +
               std::to_string(ids.size()));
  }
  for (size_t i = 0; i < ids.size(); i++) {
    if (ids[i] >= n_vocab) {
      refuse(file, kAdded,
             "has token " + std::to_string(ids[i]) + ", but the vocabulary has " +
                 std::to_string(n_vocab) + " tokens");
    }
    if (values[i] >= kFlagsEnd) {
      refuse(file, kFlags,
             "has " + std::to_string(values[i]) + ", which is no sum of 1, 2, 4, 8 and 16");
    }
    flags[ids[i]] = values[i];
  }
  return flags;
}

void Tokenizer::read_vocabulary(const Gguf& file, uint32_t n_vocab) {
  constexpr std::string_view kTokens = "tokenizer.ggml.tokens",
                             kTypes = "tokenizer.ggml.token_type";
  const std::vector<std::string_view> texts = file.string_array(kTokens);
  const std::vector<int32_t> types = file.i32_array(kTypes);
  for (const auto& [key, size] :
       {std::pair(kTokens, texts.size()), std::pair(kTypes, types.size())}) {
    if (size != n_vocab) {
      refuse(file, key,
             "has " + std::to_string(size) + " elements, but the model's vocabulary has " +
                 std::to_string(n_vocab));
    }
  }
  const std::vector<uint32_t> flags = read_flags(file, n_vocab);
  std::fill(std::begin(byte_ids_), std::end(byte_ids_), -1);
  pieces_.resize(n_vocab);
  ids_.reserve(n_vocab);
  for (uint32_t i = 0; i < n_vocab; i++) {
    if (types[i] == kUnused) continue;
    const int32_t id = static_cast<int32_t>(i);
    const bool in_model = (flags[i] & kOutside) == 0;
    const int byte = byte_of(texts[i], types[i]);
    if (in_model) ids_.emplace(texts[i], id);
    if (in_model && byte >= 0) byte_ids_[byte] = id;
    std::u32string text = decode_utf8(texts[i]);
    if (types[i] == kControl || types[i] == kUserDefined || types[i] == kUnknown) {
      if ((flags[i] & kNormalized) != 0) text = normalizer_(text);
      add_token(text, id, flags[i]);
    }
    if (types[i] != kControl && types[i] != kUnknown) {
      pieces_[i] = byte >= 0 ? std::string(1, static_cast<char>(byte)) : text_of(text, types[i]);
    }
  }
}

void Tokenizer::add_token(const std::u32string& text, int32_t id, uint32_t flags) {
  AddedTokens& tokens = (flags & kNormalized) != 0 ? added_normalized_ : added_;
  tokens.add(text,
             {id, (flags & kSingleWord) != 0, (flags & kLstrip) != 0, (flags & kRstrip) != 0});
}

// The byte that a token of the vocabulary stands for, or -1.
int Tokenizer::byte_of(std::string_view text, int32_t type) const {
  if (kind_ != Kind::kGpt2) return type == kByte ? parse_byte_token(text) : -1;
  std::string bytes;
  const bool one = text.size() <= 2 && spell_bytes(decode_utf8(text), &bytes) && bytes.size() == 1;
  return one ? static_cast<uint8_t>(bytes[0]) : -1;
}

// What a token adds to a text.
std::string Tokenizer::text_of(const std::u32string& token, int32_t type) const {
  std::string out;
  if (kind_ != Kind::kGpt2) {
    for (const char32_t character : token) {
      append_utf8(character == kLowerOneEighthBlock ? U' ' : character, &out);
    }
  } else if (!spell_bytes(token, &out)) {
    out = type == kUserDefined ? encode_utf8(token) : "";  // other entries are not used
  }
  return out;
}

void Tokenizer::read_scores(const Gguf& file) {
  constexpr std::string_view kScores = "squat.tokenizer.scores",
                             kUnknownId = "tokenizer.ggml.unknown_token_id";
  const std::vector<double> scores = file.f64_array(kScores);
  if (scores.size() != pieces_.size()) {
    refuse(file, kScores,
           "has " + std::to_string(scores.size()) + " elements, expected " +
               std::to_string(pieces_.size()));
  }
  if (unknown_ < 0) refuse(file, kUnknownId, "is missing, but the model is 't5'");
  std::vector<Unigram::Token> tokens;
  tokens.reserve(ids_.size());
  for (const auto& [text, id] : ids_) {
    const double score = scores[static_cast<size_t>(id)];
    if (!std::isfinite(score)) {
      refuse(file, kScores, "element " + std::to_string(id) + " is no finite number");
    }
    if (!text.empty()) tokens.push_back({text, id, score});
  }
  unigram_ = Unigram(std::move(tokens), unknown_);
}

void Tokenizer::read_merges(const Gguf& file) {
  const std::vector<std::string_view> merges = file.string_array("tokenizer.ggml.merges");
  merges_.reserve(merges.size());
  std::string joined;
  for (size_t rank = 0; rank < merges.size(); rank++) {
    // Neither side is empty, so a space in front belongs to the left one.
    const size_t space = merges[rank].find(' ', 1);
    if (space != std::string_view::npos) {
      const std::string_view left = merges[rank].substr(0, space);
      const std::string_view right = merges[rank].substr(space + 1);
      joined.assign(left).append(right);
      const auto a = ids_.find(left), b = ids_.find(right), c = ids_.find(joined);
      if (a != ids_.end() && b != ids_.end() && c != ids_.end()) {
        merges_[pair_key(a->second, b->second)] = {static_cast<uint32_t>(rank), c->second};
        continue;
      }
    }
    throw Error(SQUAT_ERROR_FORMAT, file.name() + ": key 'tokenizer.ggml.merges' element " +
                                        std::to_string(rank) +
                                        " does not join two tokens of the vocabulary to a third");
  }
}

std::vector<int32_t> Tokenizer::encode(std::string_view text) const {
  std::vector<int32_t> out;
  if (add_bos_) out.push_back(bos_);
  const std::u32string characters = decode_utf8(text);
  for (const AddedTokens::Part& part : added_.split(characters)) {
    if (part.id >= 0) {
      out.push_back(part.id);
      continue;
    }
    const std::u32string_view between(characters);
    const std::u32string normalized =
        normalizer_(between.substr(part.begin, part.end - part.begin));
    for (const AddedTokens::Part& inner : added_normalized_.split(normalized)) {
      if (inner.id >= 0) {
        out.push_back(inner.id);
      } else {
        const std::u32string_view rest(normalized);
        encode_text(rest.substr(inner.begin, inner.end - inner.begin),
                    part.begin == 0 && inner.begin == 0, &out);
      }
    }
  }
  return out;
}

void Tokenizer::encode_text(std::u32string_view text, bool first, std::vector<int32_t>* out) const {
  const char32_t space = kind_ == Kind::kGpt2 ? U' ' : kLowerOneEighthBlock;
  std::u32string prefixed;
  if ((prefix_ == Prefix::kAlways || (prefix_ == Prefix::kFirst && first)) && text[0] != space) {
    prefixed.append(1, space).append(text);
    text = prefixed;
  }
  if (pre_tokenizer_ == nullptr) {
    encode_piece(text, out);
  } else {
    pre_tokenizer_->split(text, [&](std::u32string_view piece) { encode_piece(piece, out); });
  }
}

void Tokenizer::encode_piece(std::u32string_view piece, std::vector<int32_t>* out) const {
  const std::string text = encode_utf8(piece);
  if (pre_tokenizer_ != nullptr && pre_tokenizer_->whole) {
    if (const auto found = ids_.find(spelling(text)); found != ids_.end()) {
      out->push_back(found->second);
      return;
    }
  }
  if (kind_ == Kind::kUnigram) {
    encode_unigram(text, out);
    return;
  }
  std::vector<int32_t> symbols;
  bool unknown = false;  // one for a run of unknown characters
  const auto add = [&](std::string_view bytes, int32_t id) {
    if (id >= 0) {
      if (unknown) symbols.push_back(unknown_);
      unknown = false;
      symbols.push_back(id);
      return;
    }
    const bool spelled = kind_ == Kind::kLlama && encode_bytes(bytes, &symbols);
    if (!spelled) unknown = unknown_ >= 0;
  };
  if (kind_ == Kind::kGpt2) {
    for (const char byte : text) add({&byte, 1}, byte_ids_[static_cast<uint8_t>(byte)]);
  } else {
    for (size_t begin = 0, end; begin < text.size(); begin = end) {
      end = begin + 1;
      while (end < text.size() && (static_cast<uint8_t>(text[end]) & 0xc0) == 0x80) end++;
      const std::string_view character = std::string_view(text).substr(begin, end - begin);
      const auto found = ids_.find(character);
      add(character, found == ids_.end() ? -1 : found->second);
    }
  }
  if (unknown) symbols.push_back(unknown_);
  merge(&symbols);
  out->insert(out->end(), symbols.begin(), symbols.end());
}

bool Tokenizer::encode_bytes(std::string_view text, std::vector<int32_t>* out) const {
  const bool spelled = std::all_of(text.begin(), text.end(), [this](char byte) {
    return byte_ids_[static_cast<uint8_t>(byte)] >= 0;
  });
  if (!spelled) return false;
  for (const char byte : text) out->push_back(byte_ids_[static_cast<uint8_t>(byte)]);
  return true;
}

void Tokenizer::encode_unigram(std::string_view text, std::vector<int32_t>* out) const {
  for (const std::string_view piece : unigram_.split(text)) {
    if (const auto found = ids_.find(piece); found != ids_.end()) {
      out->push_back(found->second);
    } else if (!encode_bytes(piece, out)) {
      out->push_back(unknown_);
    }
  }
}

// A queue of candidate pairs and a linked list of symbols: n log n in the length of the piece,
// which matters because a hostile text can be one long piece.
void Tokenizer::merge(std::vector<int32_t>* symbols) const {
  struct Candidate {
    uint32_t rank;
    uint32_t position;
    int32_t left, right;
    int32_t token;
    bool operator>(const Candidate& other) const {
      return rank != other.rank ? rank > other.rank : position > other.position;
    }
  };
  constexpr int32_t kGone = -1;
  std::vector<int32_t>& ids = *symbols;
  const size_t n = ids.size();
  if (n < 2) return;
  std::vector<uint32_t> previous(n), next(n);
  for (uint32_t i = 0; i < n; i++) {
    previous[i] = i - 1;
    next[i] = i + 1;
  }
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<Candidate>> queue;
  const auto consider = [&](uint32_t position) {
    if (position >= n || next[position] >= n) return;
    const int32_t left = ids[position], right = ids[next[position]];
    const auto found = merges_.find(pair_key(left, right));
    if (found != merges_.end()) {
      queue.push({found->second.rank, position, left, right, found->second.token});
    }
  };
  for (uint32_t i = 0; i + 1 < n; i++) consider(i);
  while (!queue.empty()) {
    const Candidate best = queue.top();
    queue.pop();
    const uint32_t i = best.position;
    if (ids[i] != best.left || next[i] >= n || ids[next[i]] != best.right) continue;  // outdated
    ids[next[i]] = kGone;
    ids[i] = best.token;
    next[i] = next[next[i]];
    if (next[i] < n) previous[next[i]] = i;
    consider(previous[i]);  // wraps past n at the first symbol
    consider(i);
  }
  ids.erase(std::remove(ids.begin(), ids.end(), kGone), ids.end());
}

std::string Tokenizer::decode(const int32_t* tokens, size_t n) const {
  std::string out;
  for (size_t i = 0; i < n; i++) out += piece(tokens[i]);
  if (strips_space_ && !out.empty() && out[0] == ' ') out.erase(0, 1);
  return out;
}

}  // namespace squat
