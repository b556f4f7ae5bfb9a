#ifdef ONNXQ_EMULATE_AVX512
#include "kernels/avx512vnni/emulation.h"
#else
#include <immintrin.h>
#endif

#include <cstdint>

#include "kernels/compiler.h"
#include "kernels/problem.h"
#include "kernels/tables.h"

namespace {
#include "kernels/avx512vnni/isa.h"

/// Halves of finite numbers.
ONNXQ_INLINE Isa::Floats LoadFiniteHalves(const uint16_t* p) { return Isa::LoadHalfFloats(p); }

#include "kernels/float8_core.h"
}  // namespace

namespace onnxq::kernels {
#ifdef ONNXQ_EMULATE_AVX512
const Float8Kernels kAvx512VnniEmulatedFloat8 = MakeFloat8Kernels();
#else
const Float8Kernels kAvx512VnniFloat8 = MakeFloat8Kernels();
#endif
}  // namespace onnxq::kernels
