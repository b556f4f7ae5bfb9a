#pragma once

#include "abi/ort_abi.h"

namespace onnxq::ops {

/// x rounded to values of an 8-bit float times a scale; inputs x, scale.
const abi::CustomOp& Float8RoundOp();
/// The same with a scale for each row along the last axis, taken from its largest magnitude; input x.
const abi::CustomOp& Float8RoundTokensOp();

}  // namespace onnxq::ops
