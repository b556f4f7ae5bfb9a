#include <immintrin.h>

#include <cstdint>

#include "kernels/compiler.h"
#include "kernels/problem.h"
#include "kernels/tables.h"

namespace {
#include "kernels/avx2/isa.h"

#include "kernels/fields.h"

#include "kernels/core.h"
}  // namespace

namespace onnxq::kernels {
const KernelTable kAvx2 = MakeTable("avx2", kAvx2Float8);
}
