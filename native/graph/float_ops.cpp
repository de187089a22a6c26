// float_ops.h for the instruction set that the compiler assumes anyway (x86: SSE2, ARM: NEON).
#define SQUAT_FLOAT_LANES 4
#include "float_ops.inc"

#include "base/cpu.h"

namespace squat {

#if defined(__x86_64__)
extern const FloatOps kFloatOpsAvx2, kFloatOpsAvx512;
#endif

Levels make_levels(const int32_t values[16]) {
  Levels out;
  for (int i = 0; i < 16; i++) out.values[i] = static_cast<int8_t>(values[i]);
  for (int i = 0; i < 15; i++) {
    out.thresholds[i] = static_cast<int8_t>(values[i] + (values[i + 1] - values[i]) / 2);
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
