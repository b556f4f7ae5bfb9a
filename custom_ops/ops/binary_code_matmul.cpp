#include "ops/binary_code_matmul.h"

#include "kernels/binary.h"
#include "kernels/dispatch.h"
#include "ops/binary_tensors.h"
#include "ops/op_base.h"
#include "ops/product.h"

namespace onnxq::ops {
namespace {

using abi::ElementType;

class BinaryCodeMatMul {
 public:
  static constexpr const char* kName = "BinaryCodeMatMul";
  static constexpr ElementType kInputs[] = {ElementType::kFloat,   ElementType::kUint8, ElementType::kFloat16,
                                            ElementType::kFloat16, ElementType::kInt32, ElementType::kFloat};

  BinaryCodeMatMul(const abi::Api& api, const abi::KernelInfo* info)
      : tensors_(api, info, NodeTitle(api, info, kName)),
        product_(api, info, tensors_.title(), tensors_.outputs(), tensors_.depth(), kBias),
        activations_(ReadActivations(api, info, tensors_.title())) {}

  const abi::Api& api() const { return tensors_.api(); }

  void Compute(abi::KernelContext* context) const {
    kernels::BinaryWeight weight = tensors_.Bind(context);
    product_.Compute(context, [&](const Product::Operands& o, const kernels::Parallel& parallel) {
      weight.bias = o.bias;
      weight.shared_bias = o.shared_bias;
      const kernels::BinaryKernels& ours = kernels::BinaryKernelsOf(kernels::ChosenKernels());
      return kernels::MatMulBinary(ours, weight, activations_, o.x, o.rows, o.y, parallel);
    });
  }

  static void InferShape(const abi::Api& api, abi::ShapeContext* context) {
    Product::InferShape(api, context);
  }

 private:
  static constexpr size_t kBias = 5;
  BinaryTensors tensors_;
  Product product_;
  kernels::Activations activations_;
};

}  // namespace

const abi::CustomOp& BinaryCodeMatMulOp() {
  static const abi::CustomOp op = MakeOp<BinaryCodeMatMul>();
  return op;
}

}  // namespace onnxq::ops
