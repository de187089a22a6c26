// float_ops.h for the instruction set that the compiler assumes anyway (x86: SSE2, ARM: NEON).
#define SQUAT_FLOAT_LANES 8
#include "float_ops.inc"

#include "base/cpu.h"

namespace squat {

#if defined(__x86_64__)
extern const FloatOps kFloatOpsAvx2, kFloatOpsAvx512;
#endif

Levels make_levels(const int32_t levels[16]) {
  Levels out;
  out.lowest = static_cast<int8_t>(levels[0]);
  for (int i = 0; i < 15; i++) {
    const int32_t low = levels[i], high = levels[i + 1];
    out.thresholds[i] = static_cast<int8_t>(low + (high - low) / 2);
    out.distances[i] = static_cast<uint8_t>(high - low);
  }
  return out;
}

const FloatOps& float_ops([[maybe_unused]] uint32_t features) {
#if defined(__x86_64__)
  if (features & kCpuAvx512) return kFloatOpsAvx512;
  if (features & kCpuAvx2) return kFloatOpsAvx2;
#endif
  static constexpr FloatOps kFloatOps = SQUAT_FLOAT_OPS_TABLE;
  return kFloatOps;
}

}  // namespace squat
