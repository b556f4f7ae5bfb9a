#include "ops/packed_matmul.h"

#include "kernels/dispatch.h"

namespace onnxq::ops {

PackedMatMul::PackedMatMul(const abi::Api& api, const abi::KernelInfo* info, const char* op,
                           const WeightInputs& inputs, size_t bias_input)
    : api_(api),
      weight_(api, info, NodeTitle(api, info, op), inputs),
      product_(api, info, weight_.title(), weight_.outputs(), weight_.depth(), bias_input),
      activations_(ReadActivations(api, info, weight_.title())) {}

void PackedMatMul::Compute(abi::KernelContext* context, kernels::Weight weight) const {
  product_.Compute(context, [&](const Product::Operands& o, const kernels::Parallel& parallel) {
    weight.bias = o.bias;
    weight.shared_bias = o.shared_bias;
    return kernels::MatMul(kernels::ChosenKernels(), weight, activations_, o.x, o.rows, o.y, parallel);
  });
}

}  // namespace onnxq::ops
