#include <cstdint>
#include <cstring>

#include "kernels/compiler.h"
#include "kernels/half.h"
#include "kernels/problem.h"
#include "kernels/tables.h"

namespace {
#include "kernels/scalar/isa.h"

#include "kernels/fields.h"

#include "kernels/core.h"
}  // namespace

namespace onnxq::kernels {
const KernelTable kScalar = MakeTable("scalar", kScalarFloat8);
}
