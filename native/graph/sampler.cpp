#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "base/error.h"

namespace squat {

namespace {

void require(bool valid, const char* field, double value, const char* range) {
  if (!valid) {
    throw Error(SQUAT_ERROR_ARGUMENT, std::string("sampling: ") + field + " is " +
                                          std::to_string(value) + ", must be " + range);
  }
}

}  // namespace

Sampler::Sampler(const squat_sampling& sampling, uint32_t n_vocab)
    : sampling_(sampling), state_(sampling.seed), n_vocab_(n_vocab) {
  require(n_vocab > 0, "n_vocab", n_vocab, "at least 1");
  const auto& s = sampling;
  // Written so that NaN fails as well.
  require(s.repetition_penalty > 0 && std::isfinite(s.repetition_penalty), "repetition_penalty",
          s.repetition_penalty, "greater than 0");
  require(s.temperature >= 0 && std::isfinite(s.temperature), "temperature", s.temperature,
          "0 (greedy) or greater");
  require(s.top_p > 0 && s.top_p <= 1, "top_p", s.top_p, "greater than 0 and at most 1");
  require(s.min_p >= 0 && s.min_p <= 1, "min_p", s.min_p, "from 0 to 1");
}

void Sampler::accept(const int32_t* tokens, size_t n) {
  for (size_t i = 0; i < n; i++) {
    if (tokens[i] < 0 || static_cast<size_t>(tokens[i]) >= n_vocab_) {
      throw Error(SQUAT_ERROR_ARGUMENT, "token " + std::to_string(i) + " is " +
                                            std::to_string(tokens[i]) + ", must be from 0 to " +
                                            std::to_string(n_vocab_ - 1));
    }
  }
  seen_.resize(n_vocab_);
  for (size_t i = 0; i < n; i++) seen_[static_cast<size_t>(tokens[i])] = 1;
}

int32_t Sampler::next(const float* logits) {
  seen_.resize(n_vocab_);
  candidates_.resize(n_vocab_);
  for (size_t i = 0; i < n_vocab_; i++) {
    float logit = logits[i];
    if (seen_[i]) {
      logit =
          logit > 0 ? logit / sampling_.repetition_penalty : logit * sampling_.repetition_penalty;
    }
    // A damaged model may produce NaN or infinity: the comparisons below need numbers.
    constexpr float kLargest = std::numeric_limits<float>::max();
    logit = std::isnan(logit) ? -kLargest : std::clamp(logit, -kLargest, kLargest);
    candidates_[i] = {logit, static_cast<int32_t>(i), 0.0};
  }
  const int32_t token = draw();
  seen_[static_cast<size_t>(token)] = 1;
  return token;
}

int32_t Sampler::draw() {
  // Ties go to the lower id, so that the order is total and the same on every platform.
  const auto better = [](const Candidate& a, const Candidate& b) {
    return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
  };
  const auto best = std::min_element(candidates_.begin(), candidates_.end(), better);
  if (sampling_.temperature == 0) return best->token;

  const double largest = best->logit;
  if (sampling_.top_k > 0 && sampling_.top_k < candidates_.size()) {
    std::nth_element(candidates_.begin(), candidates_.begin() + sampling_.top_k, candidates_.end(),
                     better);
    candidates_.resize(sampling_.top_k);
    std::sort(candidates_.begin(), candidates_.end(), better);
  }
  // Weights relative to the most probable token, whose weight is 1.
  double total = 0;
  for (Candidate& c : candidates_) {
    c.weight = std::exp((c.logit - largest) / sampling_.temperature);
    total += c.weight;
  }
  // min-p compares with the best token only, so it may go first and leave top-p less to sort.
  candidates_.erase(
      std::remove_if(candidates_.begin(), candidates_.end(),
                     [this](const Candidate& c) { return c.weight < sampling_.min_p; }),
      candidates_.end());
  auto first = candidates_.begin();
  if (sampling_.top_p < 1) {
    // A heap hands out the best tokens one by one, at the end of the vector.
    const auto worse = [better](const Candidate& a, const Candidate& b) { return better(b, a); };
    std::make_heap(candidates_.begin(), candidates_.end(), worse);
    first = candidates_.end();
    for (double cumulated = 0; first != candidates_.begin() && cumulated < sampling_.top_p * total;
         cumulated += first->weight) {
      std::pop_heap(candidates_.begin(), first--, worse);
    }
  }
  double kept = 0;
  for (auto c = first; c != candidates_.end(); ++c) kept += c->weight;
  double left = uniform() * kept;
  for (auto c = first; c + 1 != candidates_.end(); ++c) {
    left -= c->weight;
    if (left < 0) return c->token;
  }
  return candidates_.back().token;
}

// SplitMix64 (Steele, Lea, Flood 2014), mapped to [0, 1).
double Sampler::uniform() {
  state_ += 0x9e3779b97f4a7c15u;
  uint64_t z = state_;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  z ^= z >> 31;
  return static_cast<double>(z >> 11) * 0x1.0p-53;
}

}  // namespace squat
