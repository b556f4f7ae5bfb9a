#pragma once

#include "abi/ort_abi.h"

namespace onnxq::ops {

/// y = x @ W.T + bias with W of 8-bit floats; inputs x, codes, scales, bias.
const abi::CustomOp& Float8MatMulOp();

}  // namespace onnxq::ops
