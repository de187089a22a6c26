// float_ops.h for x86 CPUs with AVX2.
#if defined(__x86_64__)

#define SQUAT_FLOAT_LANES 8
#include "float_ops.inc"

namespace squat {

extern const FloatOps kFloatOpsAvx2;
const FloatOps kFloatOpsAvx2 = SQUAT_FLOAT_OPS_TABLE;

}  // namespace squat

#endif
