#include "ops/low_bit_matmul.h"

#include <string>

#include "kernels/dispatch.h"
#include "ops/op_base.h"
#include "ops/packed_weight.h"

namespace onnxq::ops {
namespace {

constexpr size_t kX = 0;
constexpr size_t kFirstWeightInput = 1;
constexpr size_t kBias = 4;
constexpr int64_t kDefaultAccuracyLevel = 4;

kernels::Activations ReadActivations(const abi::Api& api, const abi::KernelInfo* info,
                                     const std::string& title) {
  switch (const int64_t level = IntAttribute(api, info, "accuracy_level", kDefaultAccuracyLevel)) {
    case 0:  // "unset" in MatMulNBits
    case 1:
      return kernels::Activations::kFloat32;
    case 4:
      return kernels::Activations::kInt8;
    default:
      Refuse(title, "attribute accuracy_level is " + std::to_string(level) +
                        ", expected 1 (float32 activations) or 4 (int8 activations)");
  }
}

class LowBitMatMul {
 public:
  static constexpr const char* kName = "LowBitMatMul";
  static constexpr abi::ElementType kInputs[] = {abi::ElementType::kFloat, abi::ElementType::kUint8,
                                                 abi::ElementType::kFloat16, abi::ElementType::kUint8,
                                                 abi::ElementType::kFloat};

  LowBitMatMul(const abi::Api& api, const abi::KernelInfo* info)
      : api_(api),
        weight_(api, info, NodeTitle(api, info, kName), kFirstWeightInput),
        activations_(ReadActivations(api, info, weight_.title())) {
    int is_constant = 0;
    const abi::Value* bias = nullptr;
    abi::Check(api.ConstantInput(info, kBias, &is_constant, &bias));
    if (is_constant && bias) CheckBias(bias);
  }

  const abi::Api& api() const { return api_; }

  void Compute(abi::KernelContext* context) const {
    const abi::Value* x = nullptr;
    const abi::Value* bias = nullptr;
    abi::Check(api_.Input(context, kX, &x));
    abi::Check(api_.Input(context, kBias, &bias));
    if (!x || !bias)
      Refuse(weight_.title(), std::string("input ") + (x ? "4 (bias)" : "0 (x)") + " is missing");
    std::vector<int64_t> dims = abi::ReadShape(api_, x).dims;
    if (dims.empty() || dims.back() != weight_.depth())
      Refuse(weight_.title(), "input 0 (x) is " + ShapeText(dims) + ", expected [..., " +
                                  std::to_string(weight_.depth()) + "]; feed inputs as wide as the weight");
    kernels::Weight weight = weight_.Bind(context);
    weight.shared_bias = CheckBias(bias);
    weight.bias = abi::Data<float>(api_, bias);
    // The tensor exists, so the product of its dimensions fits memory and int64.
    int64_t rows = 1;
    for (size_t i = 0; i + 1 < dims.size(); ++i) rows *= dims[i];
    dims.back() = weight.outputs;
    abi::Value* y = nullptr;
    abi::Check(api_.Output(context, 0, dims.data(), dims.size(), &y));
    if (rows == 0) return;
    void* y_data = nullptr;
    abi::Check(api_.TensorData(y, &y_data));
    SessionPool pool{api_, context};
    const bool done =
        kernels::MatMul(kernels::ChosenKernels(), weight, activations_, abi::Data<float>(api_, x), rows,
                        static_cast<float*>(y_data), pool.Interface());
    abi::Check(pool.status);
    if (!done)
      throw abi::Error{abi::ErrorCode::kFail, weight_.title() + ": out of memory for " +
                                                  std::to_string(rows) + " rows; run smaller batches"};
  }

  static void InferShape(const abi::Api& api, abi::ShapeContext* context) {
    std::optional<SymbolicShape> shape = ReadInputShape(api, context, kX);
    const int64_t outputs = ReadIntAttribute(api, context, "N");
    if (!shape || shape->dims.empty() || outputs < 1) return;
    shape->dims.back() = outputs;
    shape->symbols.back() = "";
    WriteOutputShape(api, context, *shape);
  }

 private:
  /// True when one value serves every output.
  bool CheckBias(const abi::Value* bias) const {
    const abi::Shape shape = abi::ReadShape(api_, bias);
    const bool fits = shape.dims.size() == 1 && (shape.dims[0] == weight_.outputs() || shape.dims[0] == 1);
    if (!fits || shape.type != abi::ElementType::kFloat)
      Refuse(weight_.title(), std::string("input 4 (bias) is ") + TypeName(shape.type) + " " +
                                  ShapeText(shape.dims) + ", expected float32 [" +
                                  std::to_string(weight_.outputs()) +
                                  "], or [1] for one value (zero: no bias)");
    return shape.dims[0] == 1;
  }

  abi::Api api_;
  PackedWeight weight_;
  kernels::Activations activations_;
};

}  // namespace

const abi::CustomOp& LowBitMatMulOp() {
  static const abi::CustomOp op = MakeOp<LowBitMatMul>();
  return op;
}

}  // namespace onnxq::ops
