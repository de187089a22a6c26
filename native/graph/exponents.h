// Token exponents: a vector's own power of two, by which the step of its site is multiplied
// (docs/format.md, "Numbers"). All of it is exact.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace squat {

inline constexpr int kMostExponent = 31;

// 2^exponent.
inline float power_of_two(int exponent) {
  const uint32_t bits = static_cast<uint32_t>(exponent + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return power;
}

// The smallest e from 0 with largest <= reach * 2^e, or 31 if that is too small. `largest` is no
// NaN and not negative, `reach` positive and normal.
inline int token_exponent(float largest, float reach) {
  if (largest <= reach) return 0;
  constexpr uint32_t kFraction = (1u << 23) - 1;
  uint32_t of_largest, of_reach;
  std::memcpy(&of_largest, &largest, sizeof largest);
  std::memcpy(&of_reach, &reach, sizeof reach);
  const uint32_t powers = (of_largest >> 23) - (of_reach >> 23);
  const bool beyond = (of_largest & kFraction) > (of_reach & kFraction);
  return std::min(static_cast<int>(powers + beyond), kMostExponent);
}

}  // namespace squat
