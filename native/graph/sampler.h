// Chooses the next token from logits: repetition penalty, temperature, top-k, top-p, min-p, in the
// order in which Hugging Face transformers applies them. The random numbers are our own, so that a
// seed gives the same text on every platform.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "squat.h"

namespace squat {

class Sampler {
 public:
  // Throws Error(SQUAT_ERROR_ARGUMENT) for a setting out of its range.
  Sampler(const squat_sampling& sampling, uint32_t n_vocab);

  void accept(const int32_t* tokens, size_t n);
  int32_t next(const float* logits);

 private:
  struct Candidate {
    float logit;
    int32_t token;
    double weight;
  };

  int32_t draw();
  double uniform();

  squat_sampling sampling_;
  uint64_t state_;
  size_t n_vocab_;
  // Empty before they are used: many samplers may wait for their turn.
  std::vector<uint8_t> seen_;
  std::vector<Candidate> candidates_;
};

}  // namespace squat
