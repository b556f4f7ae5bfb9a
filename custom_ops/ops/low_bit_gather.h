#pragma once

#include "abi/ort_abi.h"

namespace onnxq::ops {

/// Rows of W by index; inputs indices, packed, scales, zero_points.
const abi::CustomOp& LowBitGatherOp();

}  // namespace onnxq::ops
