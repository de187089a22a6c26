#include "cpu.h"

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace squat {
namespace {

struct Name {
  uint32_t feature;
  const char* name;
};

constexpr Name kNames[] = {
    {kCpuAvx2, "avx2"},       {kCpuAvxVnni, "avxvnni"},
    {kCpuAvx512, "avx512"},   {kCpuAvx512Vnni, "avx512vnni"},
    {kCpuAmxInt8, "amxint8"}, {kCpuNeon, "neon"},
    {kCpuDotprod, "dotprod"}, {kCpuI8mm, "i8mm"},
};

#if defined(__x86_64__) || defined(__i386__)

// XCR0: which register state the operating system saves on a context switch.
uint64_t saved_state() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

// Linux saves the registers of AMX for a process that has asked for it.
bool may_use_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return true;
#endif
}

uint32_t detect() {
  constexpr uint64_t kYmm = 0x6, kZmm = 0xe6, kTiles = 0x60000;
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return 0;
  const uint64_t saved = saved_state();
  uint32_t b7, c7, d7, a71 = 0;
  if ((saved & kYmm) != kYmm || !__get_cpuid_count(7, 0, &a, &b7, &c7, &d7)) return 0;
  if (a >= 1) __get_cpuid_count(7, 1, &a71, &b, &c, &d);

  uint32_t features = 0;
  if (b7 & (1u << 5)) features |= kCpuAvx2;
  if (a71 & (1u << 4)) features |= kCpuAvxVnni;
  constexpr uint32_t kFoundation = 1u << 16, kDoubleword = 1u << 17, kByte = 1u << 30,
                     kLength = 1u << 31, kAll = kFoundation | kDoubleword | kByte | kLength;
  if ((saved & kZmm) == kZmm && (b7 & kAll) == kAll) {
    features |= kCpuAvx512;
    if (c7 & (1u << 11)) features |= kCpuAvx512Vnni;
    constexpr uint32_t kTile = 1u << 24, kTileInt8 = 1u << 25, kMatrix = kTile | kTileInt8;
    if ((saved & kTiles) == kTiles && (d7 & kMatrix) == kMatrix && may_use_tiles()) {
      features |= kCpuAmxInt8;
    }
  }
  return features;
}

int detect_distance() {
  uint32_t a, b, c, d;
  const bool intel = __get_cpuid(0, &a, &b, &c, &d) && b == signature_INTEL_ebx;
  return intel ? 8192 : 0;
}

#elif defined(__aarch64__)

int detect_distance() { return 0; }

uint32_t detect() {
  uint32_t features = kCpuNeon;  // part of the base architecture
#if defined(__linux__)
  // Bits of the kernel's interface, spelled out because old headers lack the newer names.
  constexpr unsigned long kHwcapDotprod = 1ul << 20, kHwcap2I8mm = 1ul << 13;
  if (getauxval(AT_HWCAP) & kHwcapDotprod) features |= kCpuDotprod;
  if (getauxval(AT_HWCAP2) & kHwcap2I8mm) features |= kCpuI8mm;
#elif defined(__APPLE__)
  features |= kCpuDotprod;  // every Apple CPU that runs 64-bit macOS
#endif
  return features;
}

#else

uint32_t detect() { return 0; }

int detect_distance() { return 0; }

#endif

}  // namespace

uint32_t cpu_features() {
  static const uint32_t features = detect();
  return features;
}

int prefetch_distance() {
  static const int distance = detect_distance();
  return distance;
}

std::vector<std::string> cpu_feature_names(uint32_t features) {
  std::vector<std::string> names;
  for (const Name& entry : kNames) {
    if (features & entry.feature) names.push_back(entry.name);
  }
  return names;
}

}  // namespace squat
