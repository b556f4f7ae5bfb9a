#pragma once

#include "abi/ort_abi.h"

namespace onnxq::ops {

/// Rows of W, of 8-bit floats, by index; inputs indices, codes, scales.
const abi::CustomOp& Float8GatherOp();

}  // namespace onnxq::ops
