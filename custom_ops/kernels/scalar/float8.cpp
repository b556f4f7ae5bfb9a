#include <cstdint>
#include <cstring>

#include "kernels/compiler.h"
#include "kernels/half.h"
#include "kernels/problem.h"
#include "kernels/tables.h"

namespace {
#include "kernels/scalar/isa.h"

/// Halves of finite numbers, without a branch for each.
ONNXQ_INLINE Isa::Floats LoadFiniteHalves(const uint16_t* p) {
  const Unsigned4 half{p[0], p[1], p[2], p[3]};
  const Unsigned4 magnitude = half & 0x7fffu;
  // Subnormals are whole numbers of 2**-24.
  const Isa::Floats subnormal = Isa::ToFloats(Isa::Ints(magnitude)) * 5.9604644775390625e-8f;
  const Unsigned4 bits = magnitude < 0x400u ? Unsigned4(subnormal) : (magnitude << 13) + (112u << 23);
  return Isa::Floats(bits | (half & 0x8000u) << 16);
}

#include "kernels/float8_core.h"
}  // namespace

namespace onnxq::kernels {
const Float8Kernels kScalarFloat8 = MakeFloat8Kernels();
}
