#include <cstdint>
#include <cstring>

#include "kernels/compiler.h"
#include "kernels/half.h"
#include "kernels/problem.h"
#include "kernels/tables.h"

namespace {
#include "kernels/scalar/isa.h"

#include "kernels/float8_core.h"
}  // namespace

namespace onnxq::kernels {
const Float8Kernels kScalarFloat8 = MakeFloat8Kernels();
}
