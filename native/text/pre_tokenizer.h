// How a text is cut into the pieces that a byte-level BPE merges within: one row for each value of
// `tokenizer.ggml.pre`.
#pragma once

#include <string>
#include <string_view>

namespace squat {

struct PreTokenizer {
  const char* name;
  bool splits_digits;  // each numeral is a piece of its own; the pattern sees what lies between
  bool whole;          // a piece that is a token is that token, whatever the merges say
  // The end of the piece that begins at `begin`, which is less than the text's size.
  size_t (*piece_end)(std::u32string_view text, size_t begin);

  // Calls `use` with every piece of `text`, in order.
  template <class Use>
  void split(std::u32string_view text, Use&& use) const;
};

// Null: there is none of that name.
const PreTokenizer* find_pre_tokenizer(std::string_view name);
// All names, for messages.
std::string pre_tokenizer_names();

bool is_numeral(char32_t code);  // unicode.h

template <class Use>
void PreTokenizer::split(std::u32string_view text, Use&& use) const {
  for (size_t begin = 0; begin < text.size();) {
    size_t end = begin;  // of what the pattern sees
    while (end < text.size() && !(splits_digits && is_numeral(text[end]))) end++;
    if (end == begin) {
      use(text.substr(begin++, 1));
      continue;
    }
    const std::u32string_view part = text.substr(begin, end - begin);
    for (size_t i = 0; i < part.size();) {
      const size_t piece = piece_end(part, i);
      use(part.substr(i, piece - i));
      i = piece;
    }
    begin = end;
  }
}

}  // namespace squat
