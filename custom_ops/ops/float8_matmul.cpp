#include "ops/float8_matmul.h"

#include "kernels/dispatch.h"
#include "kernels/float8.h"
#include "ops/float8_tensors.h"
#include "ops/op_base.h"
#include "ops/product.h"

namespace onnxq::ops {
namespace {

class Float8MatMul {
 public:
  static constexpr const char* kName = "Float8MatMul";
  static constexpr abi::ElementType kInputs[] = {abi::ElementType::kFloat, abi::ElementType::kUint8,
                                                 abi::ElementType::kFloat16, abi::ElementType::kFloat};

  Float8MatMul(const abi::Api& api, const abi::KernelInfo* info)
      : tensors_(api, info, NodeTitle(api, info, kName)),
        product_(api, info, tensors_.title(), tensors_.outputs(), tensors_.depth(), kBias) {}

  const abi::Api& api() const { return tensors_.api(); }

  void Compute(abi::KernelContext* context) const {
    kernels::Float8Weight weight = tensors_.Bind(context);
    product_.Compute(context, [&](const Product::Operands& o, const kernels::Parallel& parallel) {
      weight.bias = o.bias;
      weight.shared_bias = o.shared_bias;
      return kernels::MatMulFloat8(kernels::ChosenKernels(), weight, o.x, o.rows, o.y, parallel);
    });
  }

  static void InferShape(const abi::Api& api, abi::ShapeContext* context) {
    Product::InferShape(api, context);
  }

 private:
  static constexpr size_t kBias = 3;
  Float8Tensors tensors_;
  Product product_;
};

}  // namespace

const abi::CustomOp& Float8MatMulOp() {
  static const abi::CustomOp op = MakeOp<Float8MatMul>();
  return op;
}

}  // namespace onnxq::ops
