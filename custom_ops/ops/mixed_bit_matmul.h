#pragma once

#include "abi/ort_abi.h"

namespace onnxq::ops {

/// y = x @ W.T + bias for a weight of mixed bit depths; inputs x, packed, depths, columns, scales, order,
/// tables, steps, bias.
const abi::CustomOp& MixedBitMatMulOp();

}  // namespace onnxq::ops
