// float_ops.h for the instruction set that the compiler assumes anyway (x86: SSE2, ARM: NEON).
#include "float_ops.inc"

#include "cpu.h"

namespace squat {

#if defined(__x86_64__)
extern const FloatOps kFloatOpsAvx2;
#endif

const FloatOps& float_ops([[maybe_unused]] uint32_t features) {
#if defined(__x86_64__)
  // An ISA names what it needs beyond the ones below it: AVX-512 includes AVX2.
  if (features & (kCpuAvx2 | kCpuAvx512)) return kFloatOpsAvx2;
#endif
  static constexpr FloatOps kFloatOps = SQUAT_FLOAT_OPS_TABLE;
  return kFloatOps;
}

}  // namespace squat
