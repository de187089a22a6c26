// Where the time of an evaluation goes: for each step of the graph its seconds, its integer
// multiply-accumulates, and the bytes of weights, keys and values that it reads. Off unless asked
// for; then it costs two looks at the clock a step. Times are those of the calling thread, which
// takes part in every step and waits for the others.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>

#include "squat.h"

namespace squat {

// In the order of computation; `kStepNames` has a name for each.
enum class Step : uint8_t {
  kEmbedding,
  kAttnIn,
  kQkv,
  kScores,
  kValues,
  kConvolution,
  kAttnOut,
  kOutput,
  kMlpIn,
  kGateUp,
  kMlpMid,
  kDown,
  kHeadIn,
  kHead,
};

inline constexpr const char* kStepNames[] = {
    "embedding, angles",
    "attn_in: norm, quantize",
    "q, k, v",
    "scores, softmax",
    "weighted values",
    "convolution",
    "attn_out: quantize",
    "output projection",
    "mlp_in: norm, quantize",
    "gate, up",
    "mlp_mid: activation, quantize",
    "down projection",
    "head_in: norm, quantize",
    "head",
};
inline constexpr size_t kSteps = sizeof(kStepNames) / sizeof(kStepNames[0]);

class Profile {
 public:
  void restart(bool on) {
    on_ = on;
    for (size_t i = 0; i < kSteps; i++) entries_[i] = {kStepNames[i], 0, 0, 0, 0};
  }
  const squat_profile_entry* entries() const { return entries_; }

  // Counts from its making to its end.
  class Timer {
   public:
    Timer(Profile& profile, Step step, int64_t macs = 0, int64_t bytes = 0)
        : entry_(profile.on_ ? &profile.entries_[static_cast<size_t>(step)] : nullptr) {
      if (entry_ == nullptr) return;
      entry_->macs += static_cast<uint64_t>(macs);
      entry_->bytes += static_cast<uint64_t>(bytes);
      entry_->calls++;
      start_ = Clock::now();
    }
    ~Timer() {
      if (entry_ == nullptr) return;
      entry_->seconds += std::chrono::duration<double>(Clock::now() - start_).count();
    }
    Timer(const Timer&) = delete;
    Timer& operator=(const Timer&) = delete;

   private:
    using Clock = std::chrono::steady_clock;
    squat_profile_entry* entry_;
    Clock::time_point start_;
  };

 private:
  bool on_ = false;
  squat_profile_entry entries_[kSteps] = {};
};

}  // namespace squat
