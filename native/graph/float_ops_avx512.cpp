// float_ops.h for x86 CPUs with AVX-512.
#if defined(__x86_64__)

#define SQUAT_FLOAT_LANES 16
#include "float_ops.inc"

namespace squat {

extern const FloatOps kFloatOpsAvx512;
const FloatOps kFloatOpsAvx512 = SQUAT_FLOAT_OPS_TABLE;

}  // namespace squat

#endif
