// A unigram language model of tokens: a text is cut into those whose scores have the largest sum.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

namespace squat {

class Unigram {
 public:
  struct Token {
    std::string_view text;
    int32_t id;
    double score;
  };

  Unigram() = default;
  // The texts must outlive the object; `unknown` stands for characters that no token spells.
  Unigram(std::vector<Token> tokens, int32_t unknown);

  // The pieces of a text in UTF-8, in order; a run of unknown characters is one.
  std::vector<std::string_view> split(std::string_view text) const;

 private:
  // Calls `use` with every token that `text` begins with, shortest first.
  template <class Use>
  void prefixes(std::string_view text, Use&& use) const;

  std::vector<Token> tokens_;  // by text
  int32_t unknown_ = -1;
  double unknown_score_ = 0;
};

}  // namespace squat
