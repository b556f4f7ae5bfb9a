#pragma once

#include "abi/ort_abi.h"

namespace onnxq::ops {

/// Rows of a table of binary codes, of which each may have its own number of bits; inputs indices, codes,
/// scales, offsets, rank.
const abi::CustomOp& MixedBitGatherOp();

}  // namespace onnxq::ops
