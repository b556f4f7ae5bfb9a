#include "ops/float8_gather.h"

#include "kernels/dispatch.h"
#include "kernels/float8.h"
#include "ops/float8_tensors.h"
#include "ops/lookup.h"
#include "ops/op_base.h"

namespace onnxq::ops {
namespace {

class Float8Gather {
 public:
  static constexpr const char* kName = "Float8Gather";
  static constexpr abi::ElementType kInputs[] = {Lookup::kIndexType, abi::ElementType::kUint8,
                                                 abi::ElementType::kFloat16};

  Float8Gather(const abi::Api& api, const abi::KernelInfo* info)
      : tensors_(api, info, NodeTitle(api, info, kName)),
        lookup_(api, tensors_.title(), tensors_.outputs(), tensors_.depth()) {}

  const abi::Api& api() const { return tensors_.api(); }

  void Compute(abi::KernelContext* context) const {
    const kernels::Float8Weight weight = tensors_.Bind(context);
    lookup_.Compute(context, [&](int64_t row, float* out) {
      kernels::DecodeFloat8Row(kernels::ChosenKernels(), weight, row, out);
    });
  }

  static void InferShape(const abi::Api& api, abi::ShapeContext* context) {
    Lookup::InferShape(api, context);
  }

 private:
  Float8Tensors tensors_;
  Lookup lookup_;
};

}  // namespace

const abi::CustomOp& Float8GatherOp() {
  static const abi::CustomOp op = MakeOp<Float8Gather>();
  return op;
}

}  // namespace onnxq::ops
