#pragma once

#include "abi/ort_abi.h"

namespace onnxq::ops {

/// x [..., d] to its coefficients [..., d / w * w']; inputs x, signs, block.
const abi::CustomOp& FrameAnalysisOp();
/// The transpose: coefficients [..., d / w * w'] to [..., d]; the same inputs.
const abi::CustomOp& FrameSynthesisOp();

}  // namespace onnxq::ops
