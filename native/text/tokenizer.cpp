#include "tokenizer.h"

#include <algorithm>
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

// The bytes that a token of GPT-2's alphabet spells; false if it has any other character.
bool spell_bytes(std::string_view token, std::string* bytes) {
  static const std::vector<int> table = [] {
    std::vector<int> characters(0x180, -1);
    for (int byte = 0; byte < 256; byte++) {
      characters[byte_to_character(static_cast<uint8_t>(byte))] = byte;
    }
    return characters;
  }();
  bytes->clear();
  for (const char32_t character : decode_utf8(token)) {
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

// The end of the piece that begins at `i`, by GPT-2's pattern:
//   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
size_t gpt2_piece_end(const std::u32string& text, size_t i) {
  const size_t size = text.size();
  if (text[i] == U'\'') {
    for (const char32_t* suffix : {U"s", U"t", U"re", U"ve", U"m", U"ll", U"d"}) {
      const std::u32string_view ending(suffix);
      if (text.compare(i + 1, ending.size(), ending) == 0) return i + 1 + ending.size();
    }
  }
  enum Class { kLetter, kNumber, kSpace, kOther };
  const auto class_of = [](char32_t c) {
    return is_space(c) ? kSpace : is_letter(c) ? kLetter : is_number(c) ? kNumber : kOther;
  };
  const auto run_end = [&](size_t begin, Class kind) {
    while (begin < size && class_of(text[begin]) == kind) begin++;
    return begin;
  };
  const size_t word = i + (text[i] == U' ' && i + 1 < size ? 1 : 0);
  if (const Class kind = class_of(text[word]); kind != kSpace) return run_end(word, kind);
  // White space leaves its last character to the word that follows, unless it is alone.
  const size_t end = run_end(i, kSpace);
  return end == size || end == i + 1 ? end : end - 1;
}

}  // namespace

Tokenizer::Tokenizer(const Gguf& file, uint32_t n_vocab) {
  const std::string_view model = file.string("tokenizer.ggml.model");
  if (model != "gpt2" && model != "llama") {
    throw Error(SQUAT_ERROR_FORMAT, file.name() + ": key 'tokenizer.ggml.model' is '" +
                                        std::string(model) + "', expected 'gpt2' or 'llama'");
  }
  kind_ = model == "gpt2" ? Kind::kGpt2 : Kind::kLlama;
  if (kind_ == Kind::kGpt2) {
    const std::string_view pre = file.string("tokenizer.ggml.pre");
    if (pre != "gpt-2" && pre != "smollm") {
      throw Error(SQUAT_ERROR_FORMAT, file.name() + ": key 'tokenizer.ggml.pre' is '" +
                                          std::string(pre) + "', expected 'gpt-2' or 'smollm'");
    }
    split_digits_ = pre == "smollm";
  }
  const auto flag = [&file](std::string_view key) { return file.has(key) && file.boolean(key); };
  nfkc_ = flag("squat.tokenizer.nfkc");
  add_space_prefix_ = flag("tokenizer.ggml.add_space_prefix");
  add_bos_ = flag("tokenizer.ggml.add_bos_token");
  const auto token_id = [&](std::string_view key) {
    if (!file.has(key)) return -1;
    const uint32_t id = file.u32(key);
    if (id >= n_vocab) {
      throw Error(SQUAT_ERROR_FORMAT, file.name() + ": key '" + std::string(key) + "' is " +
                                          std::to_string(id) + ", but the vocabulary has " +
                                          std::to_string(n_vocab) + " tokens");
    }
    return static_cast<int32_t>(id);
  };
  bos_ = token_id("tokenizer.ggml.bos_token_id");
  unknown_ = token_id("tokenizer.ggml.unknown_token_id");
  if (add_bos_ && bos_ < 0) {
    throw Error(SQUAT_ERROR_FORMAT, file.name() +
                                        ": key 'tokenizer.ggml.add_bos_token' is true, but key "
                                        "'tokenizer.ggml.bos_token_id' is missing");
  }
  read_vocabulary(file, n_vocab);
  read_merges(file);
}

void Tokenizer::read_vocabulary(const Gguf& file, uint32_t n_vocab) {
  const std::vector<std::string_view> texts = file.string_array("tokenizer.ggml.tokens");
  const std::vector<int32_t> types = file.i32_array("tokenizer.ggml.token_type");
  for (const auto& [key, size] : {std::pair("tokenizer.ggml.tokens", texts.size()),
                                  std::pair("tokenizer.ggml.token_type", types.size())}) {
    if (size != n_vocab) {
      throw Error(SQUAT_ERROR_FORMAT,
                  file.name() + ": key '" + key + "' has " + std::to_string(size) +
                      " elements, but the model's vocabulary has " + std::to_string(n_vocab));
    }
  }
  std::fill(std::begin(byte_ids_), std::end(byte_ids_), -1);
  added_.resize(256);
  pieces_.resize(n_vocab);
  ids_.reserve(n_vocab);
  std::string bytes;
  for (uint32_t i = 0; i < n_vocab; i++) {
    const int32_t id = static_cast<int32_t>(i);
    const std::string_view text = texts[i];
    ids_.emplace(text, id);
    if (types[i] == kControl || types[i] == kUserDefined || types[i] == kUnknown) {
      if (!text.empty()) added_[static_cast<uint8_t>(text[0])].push_back(id);
      if (types[i] == kUserDefined) pieces_[i] = text;
    } else if (kind_ == Kind::kGpt2) {
      if (!spell_bytes(text, &bytes)) continue;  // unused entries need not be spelled in bytes
      pieces_[i] = bytes;
      if (bytes.size() == 1) byte_ids_[static_cast<uint8_t>(bytes[0])] = id;
    } else if (const int byte = parse_byte_token(text); types[i] == kByte && byte >= 0) {
      pieces_[i] = std::string(1, static_cast<char>(byte));
      byte_ids_[byte] = id;
    } else if (types[i] == kNormal) {
      for (const char32_t character : decode_utf8(text)) {
        append_utf8(character == kLowerOneEighthBlock ? U' ' : character, &pieces_[i]);
      }
    }
  }
  added_texts_ = texts;
  for (std::vector<int32_t>& bucket : added_) {
    std::stable_sort(bucket.begin(), bucket.end(), [&](int32_t a, int32_t b) {
      return texts[static_cast<size_t>(a)].size() > texts[static_cast<size_t>(b)].size();
    });
  }
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
        merges_.emplace(pair_key(a->second, b->second),
                        Merge{static_cast<uint32_t>(rank), c->second});
        continue;
      }
    }
    throw Error(SQUAT_ERROR_FORMAT, file.name() + ": key 'tokenizer.ggml.merges' element " +
                                        std::to_string(rank) +
                                        " does not join two tokens of the vocabulary to a third");
  }
}

int32_t Tokenizer::added_token_at(std::string_view text) const {
  for (const int32_t id : added_[static_cast<uint8_t>(text[0])]) {
    const std::string_view added = added_texts_[static_cast<size_t>(id)];
    if (text.substr(0, added.size()) == added) return id;
  }
  return -1;
}

std::vector<int32_t> Tokenizer::encode(std::string_view text) const {
  std::vector<int32_t> out;
  if (add_bos_) out.push_back(bos_);
  size_t begin = 0;  // of the text since the last added token
  for (size_t i = 0; i < text.size();) {
    const int32_t added = added_token_at(text.substr(i));
    if (added < 0) {
      i++;
      continue;
    }
    encode_text(text.substr(begin, i - begin), &out);
    out.push_back(added);
    i += added_texts_[static_cast<size_t>(added)].size();
    begin = i;
  }
  encode_text(text.substr(begin), &out);
  return out;
}

void Tokenizer::encode_text(std::string_view text, std::vector<int32_t>* out) const {
  if (text.empty()) return;
  std::u32string characters = decode_utf8(text);
  if (nfkc_) characters = nfkc(characters);
  if (kind_ == Kind::kGpt2) {
    if (add_space_prefix_ && (characters.empty() || characters[0] != U' ')) {
      characters.insert(characters.begin(), U' ');
    }
    encode_gpt2(characters, out);
  } else {
    std::replace(characters.begin(), characters.end(), U' ', kLowerOneEighthBlock);
    if (add_space_prefix_) characters.insert(characters.begin(), kLowerOneEighthBlock);
    encode_llama(characters, out);
  }
}

void Tokenizer::encode_gpt2(const std::u32string& text, std::vector<int32_t>* out) const {
  std::vector<int32_t> symbols;
  std::string bytes;
  const auto encode_piece = [&](const std::u32string& part, size_t begin, size_t end) {
    bytes.clear();
    for (size_t k = begin; k < end; k++) append_utf8(part[k], &bytes);
    symbols.clear();
    for (const char byte : bytes) {
      // A vocabulary without this byte cannot express it.
      const int32_t id = byte_ids_[static_cast<uint8_t>(byte)];
      if (id >= 0) symbols.push_back(id);
    }
    merge(&symbols);
    out->insert(out->end(), symbols.begin(), symbols.end());
  };
  const auto encode_words = [&](const std::u32string& part) {
    for (size_t i = 0; i < part.size();) {
      const size_t end = gpt2_piece_end(part, i);
      encode_piece(part, i, end);
      i = end;
    }
  };
  if (!split_digits_) {
    encode_words(text);
    return;
  }
  // Each number character is a piece of its own; the pattern sees only what lies between.
  size_t begin = 0;
  for (size_t i = 0; i <= text.size(); i++) {
    if (i < text.size() && !is_number(text[i])) continue;
    encode_words(text.substr(begin, i - begin));
    if (i < text.size()) encode_piece(text, i, i + 1);
    begin = i + 1;
  }
}

void Tokenizer::encode_llama(const std::u32string& text, std::vector<int32_t>* out) const {
  std::vector<int32_t> symbols;
  std::string bytes;
  for (const char32_t character : text) {
    bytes.clear();
    append_utf8(character, &bytes);
    if (const auto found = ids_.find(bytes); found != ids_.end()) {
      symbols.push_back(found->second);
      continue;
    }
    const bool spelled = std::all_of(bytes.begin(), bytes.end(), [this](char byte) {
      return byte_ids_[static_cast<uint8_t>(byte)] >= 0;
    });
    if (spelled) {
      for (const char byte : bytes) symbols.push_back(byte_ids_[static_cast<uint8_t>(byte)]);
    } else if (unknown_ >= 0 && (symbols.empty() || symbols.back() != unknown_)) {
      symbols.push_back(unknown_);  // one for a run of unknown characters
    }
  }
  merge(&symbols);
  out->insert(out->end(), symbols.begin(), symbols.end());
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
  const bool prefixed = kind_ == Kind::kLlama && add_space_prefix_;
  if (prefixed && !out.empty() && out[0] == ' ') out.erase(0, 1);
  return out;
}

}  // namespace squat
