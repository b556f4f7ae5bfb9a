#pragma once

#include "abi/ort_abi.h"

namespace onnxq::ops {

/// y = x @ W.T + bias with W a sum of scaled signs; inputs x, codes, scales, offsets, rank, bias.
const abi::CustomOp& BinaryCodeMatMulOp();

}  // namespace onnxq::ops
