#pragma once

#include "abi/ort_abi.h"

namespace onnxq::ops {

/// y = x @ W.T + bias; inputs x, packed, scales, zero_points, bias.
const abi::CustomOp& LowBitMatMulOp();

}  // namespace onnxq::ops
