#include <immintrin.h>

#include <cstdint>

#include "kernels/compiler.h"
#include "kernels/problem.h"
#include "kernels/tables.h"

namespace {
#include "kernels/avx2/isa.h"

/// Halves of finite numbers.
ONNXQ_INLINE Isa::Floats LoadFiniteHalves(const uint16_t* p) { return Isa::LoadHalfFloats(p); }

#include "kernels/float8_core.h"
}  // namespace

namespace onnxq::kernels {
const Float8Kernels kAvx2Float8 = MakeFloat8Kernels();
}
