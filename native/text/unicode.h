// The little of Unicode that tokenizers need: UTF-8, classes of characters, lower case and the
// normalization forms C and KC.
#pragma once

#include <string>
#include <string_view>

namespace squat {

// Ill-formed bytes become U+FFFD.
std::u32string decode_utf8(std::string_view text);

void append_utf8(char32_t code, std::string* out);
std::string encode_utf8(std::u32string_view text);

bool is_letter(char32_t code);          // general category L
bool is_number(char32_t code);          // general category N
bool is_numeral(char32_t code);         // the same, of a newer Unicode: what is split as a digit
bool is_space(char32_t code);           // property White_Space
bool is_word_character(char32_t code);  // \w of regular expressions (Unicode Technical Standard 18)

// Character by character, whatever stands around it.
std::u32string lower_case(const std::u32string& text);

// Normalization forms C and KC (Unicode Standard Annex 15).
std::u32string nfc(const std::u32string& text);
std::u32string nfkc(const std::u32string& text);

}  // namespace squat
