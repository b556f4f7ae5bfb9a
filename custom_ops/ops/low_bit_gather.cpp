#include "ops/low_bit_gather.h"

#include "kernels/gather.h"
#include "ops/lookup.h"
#include "ops/op_base.h"
#include "ops/packed_weight.h"

namespace onnxq::ops {
namespace {

class LowBitGather {
 public:
  static constexpr const char* kName = "LowBitGather";
  static constexpr abi::ElementType kInputs[] = {Lookup::kIndexType, abi::ElementType::kUint8,
                                                 abi::ElementType::kFloat16, abi::ElementType::kUint8};

  LowBitGather(const abi::Api& api, const abi::KernelInfo* info)
      : api_(api),
        weight_(api, info, NodeTitle(api, info, kName), {.packed = 1, .scales = 2, .zero_points = 3}),
        lookup_(api, weight_.title(), weight_.outputs(), weight_.depth()) {}

  const abi::Api& api() const { return api_; }

  void Compute(abi::KernelContext* context) const {
    const kernels::Weight weight = weight_.Bind(context);
    lookup_.Compute(context, [&](int64_t row, float* out) { kernels::DecodeRow(weight, row, out); });
  }

  static void InferShape(const abi::Api& api, abi::ShapeContext* context) {
    Lookup::InferShape(api, context);
  }

 private:
  abi::Api api_;
  PackedWeight weight_;
  Lookup lookup_;
};

}  // namespace

const abi::CustomOp& LowBitGatherOp() {
  static const abi::CustomOp op = MakeOp<LowBitGather>();
  return op;
}

}  // namespace onnxq::ops
