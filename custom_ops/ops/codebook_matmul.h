#pragma once

#include "abi/ort_abi.h"

namespace onnxq::ops {

/// y = x @ W.T + bias with levels looked up in a table; inputs x, packed, table, scales, zero_points, bias.
const abi::CustomOp& CodebookMatMulOp();

}  // namespace onnxq::ops
