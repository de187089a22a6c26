// What this CPU can do, as far as a kernel cares, including whether the operating system saves the
// registers. Asked once per process.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace squat {

enum CpuFeature : uint32_t {
  kCpuAvx2 = 1u << 0,
  kCpuAvxVnni = 1u << 1,
  kCpuAvx512 = 1u << 2,  // F, BW, DQ and VL
  kCpuAvx512Vnni = 1u << 3,
  kCpuAmxInt8 = 1u << 4,
  kCpuNeon = 1u << 5,
  kCpuDotprod = 1u << 6,
  kCpuI8mm = 1u << 7,
};

// Mask of the features that can be used here.
uint32_t cpu_features();

// How many bytes ahead of where a stream is read it should be asked for, 0 for not at all: on
// Intel's CPUs the second-level cache's own prefetcher ends with a page, and begins the next one
// late.
int prefetch_distance();

// Their names, for people: {"avx2", "avx512vnni"}.
std::vector<std::string> cpu_feature_names(uint32_t features);

}  // namespace squat
