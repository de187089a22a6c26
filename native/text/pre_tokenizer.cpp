#include "pre_tokenizer.h"

#include <algorithm>

#include "unicode.h"

namespace squat {

namespace {

enum Class { kLetter, kNumber, kSpace, kOther };

Class class_of(char32_t c) {
  return is_space(c) ? kSpace : is_letter(c) ? kLetter : is_number(c) ? kNumber : kOther;
}

bool is_line_break(char32_t c) { return c == U'\r' || c == U'\n'; }

size_t run_end(std::u32string_view text, size_t begin, Class kind) {
  while (begin < text.size() && class_of(text[begin]) == kind) begin++;
  return begin;
}

// 's|'t|'re|'ve|'m|'ll|'d, where `fold` turns letters into small ones: its end, or `begin`.
template <class Fold>
size_t contraction_end(std::u32string_view text, size_t begin, Fold&& fold) {
  if (text[begin] != U'\'') return begin;
  for (const std::u32string_view suffix : {U"s", U"t", U"re", U"ve", U"m", U"ll", U"d"}) {
    const std::u32string_view found = text.substr(begin + 1, suffix.size());
    const bool equal = found.size() == suffix.size() &&
                       std::equal(found.begin(), found.end(), suffix.begin(),
                                  [&fold](char32_t a, char32_t b) { return fold(a) == b; });
    if (equal) return begin + 1 + suffix.size();
  }
  return begin;
}

// \s+(?!\S)|\s+: white space leaves its last character to what follows, unless it is alone.
size_t space_end(std::u32string_view text, size_t begin) {
  const size_t end = run_end(text, begin, kSpace);
  return end == text.size() || end == begin + 1 ? end : end - 1;
}

// GPT-2's pattern:
//   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
size_t gpt2_piece_end(std::u32string_view text, size_t begin) {
  const size_t end = contraction_end(text, begin, [](char32_t c) { return c; });
  if (end != begin) return end;
  const size_t word = begin + (text[begin] == U' ' && begin + 1 < text.size() ? 1 : 0);
  const Class kind = class_of(text[word]);
  return kind == kSpace ? space_end(text, begin) : run_end(text, word, kind);
}

// Llama 3's and Qwen2's pattern, which differ in how many digits a piece has at most:
//   (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,digits}|
//    ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
template <size_t digits>
size_t words_piece_end(std::u32string_view text, size_t begin) {
  // Without regard to case, the long s (U+017F) is an s.
  const auto fold = [](char32_t c) {
    return c >= U'A' && c <= U'Z' ? c + (U'a' - U'A') : c == 0x17f ? U's' : c;
  };
  if (const size_t end = contraction_end(text, begin, fold); end != begin) return end;
  const Class first = class_of(text[begin]);
  if (first == kNumber) return run_end(text.substr(0, begin + digits), begin, kNumber);
  // One character that is no letter may begin a word, but not the next line.
  const size_t word = begin + (first == kLetter || is_line_break(text[begin]) ? 0 : 1);
  if (const size_t end = run_end(text, word, kLetter); end != word) return end;
  const size_t marks = begin + (text[begin] == U' ' ? 1 : 0);
  if (size_t end = run_end(text, marks, kOther); end != marks) {
    while (end < text.size() && is_line_break(text[end])) end++;
    return end;
  }
  // White space up to the last line break in it.
  for (size_t end = run_end(text, begin, kSpace); end != begin; end--) {
    if (is_line_break(text[end - 1])) return end;
  }
  return space_end(text, begin);
}

constexpr PreTokenizer kPreTokenizers[] = {
    {"gpt-2", false, false, gpt2_piece_end},        {"smollm", true, false, gpt2_piece_end},
    {"llama-bpe", false, true, words_piece_end<3>}, {"dbrx", false, false, words_piece_end<3>},
    {"qwen2", false, false, words_piece_end<1>},
};

}  // namespace

const PreTokenizer* find_pre_tokenizer(std::string_view name) {
  for (const PreTokenizer& row : kPreTokenizers) {
    if (row.name == name) return &row;
  }
  return nullptr;
}

std::string pre_tokenizer_names() {
  std::string names;
  for (const PreTokenizer& row : kPreTokenizers) {
    names += (names.empty() ? "" : ", ") + std::string(row.name);
  }
  return names;
}

}  // namespace squat
