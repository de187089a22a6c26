#include "unigram.h"

#include <algorithm>
#include <limits>

namespace squat {

namespace {

constexpr double kUnknownPenalty = 10;  // of an unknown character, below the lowest score

size_t character_end(std::string_view text, size_t begin) {
  size_t end = begin + 1;
  while (end < text.size() && (static_cast<uint8_t>(text[end]) & 0xc0) == 0x80) end++;
  return end;
}

}  // namespace

Unigram::Unigram(std::vector<Token> tokens, int32_t unknown)
    : tokens_(std::move(tokens)), unknown_(unknown) {
  double lowest = std::numeric_limits<double>::infinity();
  for (const Token& token : tokens_) lowest = std::min(lowest, token.score);
  unknown_score_ = lowest - kUnknownPenalty;
  std::sort(tokens_.begin(), tokens_.end(),
            [](const Token& a, const Token& b) { return a.text < b.text; });
}

template <class Use>
void Unigram::prefixes(std::string_view text, Use&& use) const {
  auto begin = tokens_.begin(), end = tokens_.end();  // those that agree with the text so far
  for (size_t i = 0; i < text.size() && begin != end; i++) {
    const auto byte_of = [i](const Token& token) {
      return i < token.text.size() ? static_cast<uint8_t>(token.text[i]) : -1;
    };
    const int byte = static_cast<uint8_t>(text[i]);
    begin = std::lower_bound(begin, end, byte,
                             [&](const Token& token, int value) { return byte_of(token) < value; });
    end = std::upper_bound(begin, end, byte,
                           [&](int value, const Token& token) { return value < byte_of(token); });
    if (begin != end && begin->text.size() == i + 1) use(*begin);
  }
}

std::vector<std::string_view> Unigram::split(std::string_view text) const {
  constexpr size_t kNone = SIZE_MAX;
  struct Node {  // the best path to the end of a token
    double score;
    size_t begin;  // of that token
    int32_t id;
  };
  std::vector<Node> best(text.size() + 1, Node{0, kNone, -1});
  for (size_t begin = 0, next; begin < text.size(); begin = next) {
    next = character_end(text, begin);
    bool spelled = false;  // the character, by a token of its own
    const auto offer = [&best, begin](size_t end, int32_t id, double score) {
      const double sum = score + best[begin].score;
      if (best[end].begin == kNone || sum > best[end].score) best[end] = {sum, begin, id};
    };
    prefixes(text.substr(begin), [&](const Token& token) {
      offer(begin + token.text.size(), token.id, token.score);
      spelled = spelled || begin + token.text.size() == next;
    });
    if (!spelled) offer(next, unknown_, unknown_score_);
  }
  std::vector<std::string_view> pieces;
  bool unknown = false;  // the piece that was found last, which is the one behind
  for (size_t end = text.size(); end > 0; end = best[end].begin) {
    const size_t begin = best[end].begin;
    const bool more = best[end].id == unknown_;
    if (more && unknown) {
      const size_t size = end - begin + pieces.back().size();
      pieces.back() = text.substr(begin, size);
    } else {
      pieces.push_back(text.substr(begin, end - begin));
    }
    unknown = more;
  }
  std::reverse(pieces.begin(), pieces.end());
  return pieces;
}

}  // namespace squat
