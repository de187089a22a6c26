#include "added_tokens.h"

#include <algorithm>

#include "unicode.h"

namespace squat {

void AddedTokens::add(std::u32string text, AddedToken token) {
  if (text.empty() || tokens_.count(text) != 0) return;
  texts_.push_back(std::move(text));
  const std::u32string& kept = texts_.back();
  tokens_.emplace(kept, token);
  std::vector<size_t>& sizes = sizes_[kept[0]];
  const auto place = std::lower_bound(sizes.begin(), sizes.end(), kept.size(), std::greater<>());
  if (place == sizes.end() || *place != kept.size()) sizes.insert(place, kept.size());
}

AddedTokens::Match AddedTokens::match(std::u32string_view text) const {
  const auto sizes = sizes_.find(text[0]);
  if (sizes == sizes_.end()) return {nullptr, 0};
  for (const size_t size : sizes->second) {
    if (size > text.size()) continue;
    const auto found = tokens_.find(text.substr(0, size));
    if (found != tokens_.end()) return {&found->second, size};
  }
  return {nullptr, 0};
}

std::vector<AddedTokens::Part> AddedTokens::split(std::u32string_view text) const {
  std::vector<Part> parts;
  size_t rest = 0;  // of the text, behind the last token
  for (size_t i = 0; i < text.size();) {
    const Match found = match(text.substr(i));
    if (found.token == nullptr) {
      i++;
      continue;
    }
    size_t begin = i, end = i + found.size;
    i = end;
    if (found.token->single_word && ((begin > 0 && is_word_character(text[begin - 1])) ||
                                     (end < text.size() && is_word_character(text[end])))) {
      continue;
    }
    if (found.token->lstrip) {
      while (begin > rest && is_space(text[begin - 1])) begin--;
    }
    if (found.token->rstrip) {
      while (end < text.size() && is_space(text[end])) end++;
    }
    if (rest < begin) parts.push_back({-1, rest, begin});
    parts.push_back({found.token->id, begin, end});
    rest = end;
  }
  if (rest < text.size()) parts.push_back({-1, rest, text.size()});
  return parts;
}

}  // namespace squat
