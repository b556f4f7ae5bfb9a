#include "ops/mixed_bit_gather.h"

#include "kernels/binary.h"
#include "ops/binary_tensors.h"
#include "ops/lookup.h"
#include "ops/op_base.h"

namespace onnxq::ops {
namespace {

using abi::ElementType;

class MixedBitGather {
 public:
  static constexpr const char* kName = "MixedBitGather";
  static constexpr ElementType kInputs[] = {Lookup::kIndexType, ElementType::kUint8, ElementType::kFloat16,
                                            ElementType::kFloat16, ElementType::kInt32};

  MixedBitGather(const abi::Api& api, const abi::KernelInfo* info)
      : tensors_(api, info, NodeTitle(api, info, kName)),
        lookup_(api, tensors_.title(), tensors_.outputs(), tensors_.depth()) {}

  const abi::Api& api() const { return tensors_.api(); }

  void Compute(abi::KernelContext* context) const {
    const kernels::BinaryWeight weight = tensors_.Bind(context);
    lookup_.Compute(context, [&](int64_t row, float* out) { kernels::DecodeBinaryRow(weight, row, out); });
  }

  static void InferShape(const abi::Api& api, abi::ShapeContext* context) {
    Lookup::InferShape(api, context);
  }

 private:
  BinaryTensors tensors_;
  Lookup lookup_;
};

}  // namespace

const abi::CustomOp& MixedBitGatherOp() {
  static const abi::CustomOp op = MakeOp<MixedBitGather>();
  return op;
}

}  // namespace onnxq::ops
