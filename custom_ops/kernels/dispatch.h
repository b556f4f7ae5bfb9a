// Which kernels this process runs, and why.
#pragma once

#include "kernels/problem.h"

namespace onnxq::kernels {

/// The kernels of the best ISA here, or of the one that the environment variable ONNXQ_ISA names. Chosen
/// once.
const KernelTable& ChosenKernels();

/// JSON text: version, layout_version, isa, available, built, reason, warning (null or text).
const char* Describe();

}  // namespace onnxq::kernels
