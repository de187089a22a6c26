// The tokens that are taken out of a text before it is cut into pieces, such as <|im_start|>.
#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace squat {

struct AddedToken {
  int32_t id;
  bool single_word = false;  // not where a letter, digit or underscore touches it
  bool lstrip = false;       // takes the white space in front of it along
  bool rstrip = false;       // and that behind it
};

class AddedTokens {
 public:
  // Without an effect where `text` is empty or there already.
  void add(std::u32string text, AddedToken token);

  // A piece of a text: a token, or (id -1) what lies between two, which is not empty.
  struct Part {
    int32_t id;
    size_t begin, end;
  };
  // From the left, the longest token at each place.
  std::vector<Part> split(std::u32string_view text) const;

 private:
  struct Match {
    const AddedToken* token;
    size_t size;
  };
  // The longest token at the beginning of `text`; without one the token is null.
  Match match(std::u32string_view text) const;

  std::deque<std::u32string> texts_;  // at addresses that stay
  std::unordered_map<std::u32string_view, AddedToken> tokens_;
  std::unordered_map<char32_t, std::vector<size_t>> sizes_;  // by first character, longest first
};

}  // namespace squat
