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

#include "kernels/fields.h"

#include "kernels/core.h"
}  // namespace

namespace onnxq::kernels {
#ifdef ONNXQ_EMULATE_AVX512
const KernelTable kAvx512VnniEmulated = MakeTable("avx512vnni-emulated", kAvx512VnniEmulatedFloat8);
#else
const KernelTable kAvx512Vnni = MakeTable("avx512vnni", kAvx512VnniFloat8);
#endif
}  // namespace onnxq::kernels
