// A 64-bit hash that tells files apart and finds damage; it keeps nobody from forging one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace squat {

// Every step is one-to-one in what it mixes in, so that no change of a single word goes unseen.
inline uint64_t hash64(const uint8_t* data, size_t size) {
  uint64_t hash = 0x9e3779b97f4a7c15u ^ size;
  const auto mix = [&hash](uint64_t word) {
    hash = (hash ^ word) * 0xff51afd7ed558ccdu;
    hash ^= hash >> 32;
  };
  size_t at = 0;
  for (; size - at >= sizeof(uint64_t); at += sizeof(uint64_t)) {
    uint64_t word;
    std::memcpy(&word, data + at, sizeof word);
    mix(word);
  }
  uint64_t rest = 0;
  if (at < size) std::memcpy(&rest, data + at, size - at);
  mix(rest);
  return hash;
}

}  // namespace squat
