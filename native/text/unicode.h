// The little of Unicode that tokenizers need: UTF-8, the classes of the GPT-2 pre-tokenization and
// normalization form KC.
#pragma once

#include <string>
#include <string_view>

namespace squat {

// Ill-formed bytes become U+FFFD.
std::u32string decode_utf8(std::string_view text);

void append_utf8(char32_t code, std::string* out);

bool is_letter(char32_t code);  // general category L
bool is_number(char32_t code);  // general category N
bool is_space(char32_t code);   // property White_Space

// Normalization form KC (Unicode Standard Annex 15).
std::u32string nfkc(const std::u32string& text);

}  // namespace squat
