#include "ops/packed_matmul.h"

#include "kernels/dispatch.h"
#include "ops/op_base.h"

namespace onnxq::ops {
namespace {

constexpr size_t kX = 0;
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

std::string InputTitle(size_t index, const char* name) {
  return "input " + std::to_string(index) + " (" + name + ")";
}

}  // namespace

PackedMatMul::PackedMatMul(const abi::Api& api, const abi::KernelInfo* info, const char* op,
                           const WeightInputs& inputs, size_t bias_input)
    : api_(api),
      weight_(api, info, NodeTitle(api, info, op), inputs),
      activations_(ReadActivations(api, info, weight_.title())),
      bias_input_(bias_input) {
  int is_constant = 0;
  const abi::Value* bias = nullptr;
  abi::Check(api.ConstantInput(info, bias_input, &is_constant, &bias));
  if (is_constant && bias) CheckBias(bias);
}

void PackedMatMul::Compute(abi::KernelContext* context, kernels::Weight weight) const {
  const abi::Value* x = nullptr;
  const abi::Value* bias = nullptr;
  abi::Check(api_.Input(context, kX, &x));
  abi::Check(api_.Input(context, bias_input_, &bias));
  if (!x || !bias)
    Refuse(weight_.title(), (x ? InputTitle(bias_input_, "bias") : InputTitle(kX, "x")) + " is missing");
  std::vector<int64_t> dims = abi::ReadShape(api_, x).dims;
  if (dims.empty() || dims.back() != weight_.depth())
    Refuse(weight_.title(), InputTitle(kX, "x") + " is " + ShapeText(dims) + ", expected [..., " +
                                std::to_string(weight_.depth()) + "]; feed inputs as wide as the weight");
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
  const bool done = kernels::MatMul(kernels::ChosenKernels(), weight, activations_, abi::Data<float>(api_, x),
                                    rows, static_cast<float*>(y_data), pool.Interface());
  abi::Check(pool.status);
  if (!done)
    throw abi::Error{abi::ErrorCode::kFail, weight_.title() + ": out of memory for " + std::to_string(rows) +
                                                " rows; run smaller batches"};
}

void PackedMatMul::InferShape(const abi::Api& api, abi::ShapeContext* context) {
  std::optional<SymbolicShape> shape = ReadInputShape(api, context, kX);
  const int64_t outputs = ReadIntAttribute(api, context, "N");
  if (!shape || shape->dims.empty() || outputs < 1) return;
  shape->dims.back() = outputs;
  shape->symbols.back() = "";
  WriteOutputShape(api, context, *shape);
}

bool PackedMatMul::CheckBias(const abi::Value* bias) const {
  const abi::Shape shape = abi::ReadShape(api_, bias);
  const bool fits = shape.dims.size() == 1 && (shape.dims[0] == weight_.outputs() || shape.dims[0] == 1);
  if (!fits || shape.type != abi::ElementType::kFloat)
    Refuse(weight_.title(), InputTitle(bias_input_, "bias") + " is " + TypeName(shape.type) + " " +
                                ShapeText(shape.dims) + ", expected float32 [" +
                                std::to_string(weight_.outputs()) +
                                "], or [1] for one value (zero: no bias)");
  return shape.dims[0] == 1;
}

}  // namespace onnxq::ops
