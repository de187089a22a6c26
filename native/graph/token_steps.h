// What a vector multiplies its site's step by (docs/format.md, "Numbers"). Such a number has two
// bits behind the point and is kept as a byte, quarters of powers of two: 4 k + f stands for
// (1 + f / 4) * 2^k. All of it is exact.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace squat {

inline constexpr int kMostExponent = 31;
inline constexpr int8_t kOne = 0;  // the quarters of 1

inline float multiplier(int8_t quarters) {
  const uint32_t bits = static_cast<uint32_t>(quarters + 4 * 127) << 21;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Token exponents: 2^e, with e the smallest from 0 with largest <= reach * 2^e, or 31 if that is
// too small. `largest` is no NaN and not negative, `reach` positive and normal.
inline int8_t exponent_quarters(float largest, float reach) {
  if (largest <= reach) return kOne;
  constexpr uint32_t kFraction = (1u << 23) - 1;
  uint32_t of_largest, of_reach;
  std::memcpy(&of_largest, &largest, sizeof largest);
  std::memcpy(&of_reach, &reach, sizeof reach);
  const uint32_t powers = (of_largest >> 23) - (of_reach >> 23);
  const bool beyond = (of_largest & kFraction) > (of_reach & kFraction);
  return static_cast<int8_t>(4 * std::min(static_cast<int>(powers + beyond), kMostExponent));
}

// Peaks: `largest`, which is no NaN and not negative, rounded up to two bits, over 128.
inline int8_t peak_quarters(float largest) {
  uint32_t bits;
  std::memcpy(&bits, &largest, sizeof largest);
  const int quarters = static_cast<int>((bits + ((1u << 21) - 1)) >> 21) - 4 * (127 + 7);
  return static_cast<int8_t>(std::clamp(quarters, -128, 127));
}

}  // namespace squat
