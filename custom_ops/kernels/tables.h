// One table of kernels per ISA that this build holds.
#pragma once

#include "kernels/problem.h"

namespace onnxq::kernels {

extern const KernelTable kScalar;
extern const KernelTable kAvx2;
extern const KernelTable kAvx512Vnni;
extern const KernelTable
    kAvx512VnniEmulated;  ///< the AVX-512 source on plain loops; only in the test program

// What their member float8 points at.
extern const Float8Kernels kScalarFloat8;
extern const Float8Kernels kAvx2Float8;
extern const Float8Kernels kAvx512VnniFloat8;
extern const Float8Kernels kAvx512VnniEmulatedFloat8;

}  // namespace onnxq::kernels
