// What is done to the characters of a text before it is cut into pieces: a list of steps.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace squat {

class Normalizer {
 public:
  enum class Kind { kNfc, kNfkc, kLowerCase, kPrepend, kReplace };

  // `words` are the steps, each a name (nfc, nfkc, lowercase, prepend, replace) with what it is
  // done with behind it (prepend: the text; replace: what, and by what), at most kMost characters.
  // False: they are no such list.
  static constexpr size_t kMost = 64;
  static bool parse(const std::vector<std::string_view>& words, Normalizer* normalizer);

  void add(Kind kind, std::u32string first = {}, std::u32string second = {}) {
    steps_.push_back({kind, std::move(first), std::move(second)});
  }

  // Throws Error(SQUAT_ERROR_FORMAT) if the text would grow without end.
  std::u32string operator()(std::u32string_view text) const;

 private:
  struct Step {
    Kind kind;
    std::u32string first, second;  // what is prepended; what is replaced, and by what
  };

  std::vector<Step> steps_;
};

}  // namespace squat
