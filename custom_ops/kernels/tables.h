// One table of kernels per ISA that this build holds.
#pragma once

#include "kernels/problem.h"

namespace onnxq::kernels {

extern const KernelTable kScalar;
extern const KernelTable kAvx2;
extern const KernelTable kAvx512Vnni;
extern const KernelTable
    kAvx512VnniEmulated;  ///< the AVX-512 source on plain loops; only in the test program

}  // namespace onnxq::kernels
