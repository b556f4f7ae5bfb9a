#include "ops/low_bit_matmul.h"

#include "ops/op_base.h"
#include "ops/packed_matmul.h"

namespace onnxq::ops {
namespace {

class LowBitMatMul {
 public:
  static constexpr const char* kName = "LowBitMatMul";
  static constexpr abi::ElementType kInputs[] = {abi::ElementType::kFloat, abi::ElementType::kUint8,
                                                 abi::ElementType::kFloat16, abi::ElementType::kUint8,
                                                 abi::ElementType::kFloat};

  LowBitMatMul(const abi::Api& api, const abi::KernelInfo* info)
      : product_(api, info, kName, {.packed = 1, .scales = 2, .zero_points = 3}, kBias) {}

  const abi::Api& api() const { return product_.api(); }
  void Compute(abi::KernelContext* context) const {
    product_.Compute(context, product_.weight().Bind(context));
  }
  static void InferShape(const abi::Api& api, abi::ShapeContext* context) {
    Product::InferShape(api, context);
  }

 private:
  static constexpr size_t kBias = 4;
  PackedMatMul product_;
};

}  // namespace

const abi::CustomOp& LowBitMatMulOp() {
  static const abi::CustomOp op = MakeOp<LowBitMatMul>();
  return op;
}

}  // namespace onnxq::ops
