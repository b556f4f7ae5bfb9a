#include <immintrin.h>

#include <cstdint>

#include "kernels/compiler.h"
#include "kernels/problem.h"
#include "kernels/tables.h"

namespace {
#include "kernels/avx2/isa.h"

#include "kernels/float8_core.h"
}  // namespace

namespace onnxq::kernels {
const Float8Kernels kAvx2Float8 = MakeFloat8Kernels();
}
