#include "ops/product.h"

#include <utility>

#include "ops/node.h"

namespace onnxq::ops {
namespace {

constexpr size_t kX = 0;
constexpr int64_t kDefaultAccuracyLevel = 4;

}  // namespace

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

Product::Product(const abi::Api& api, const abi::KernelInfo* info, std::string title, int64_t outputs,
                 int64_t depth, size_t bias_input)
    : api_(api), title_(std::move(title)), outputs_(outputs), depth_(depth), bias_input_(bias_input) {
  if (const abi::Value* bias = ConstantInput(api, info, bias_input)) CheckBias(bias);
}

Product::Operands Product::Bind(abi::KernelContext* context) const {
  const abi::Value* x = RequiredInput(api_, context, title_, kX, "x");
  const abi::Value* bias = RequiredInput(api_, context, title_, bias_input_, "bias");
  std::vector<int64_t> dims = abi::ReadShape(api_, x).dims;
  if (dims.empty() || dims.back() != depth_)
    Refuse(title_, InputTitle(kX, "x") + " is " + ShapeText(dims) + ", expected [..., " +
                       std::to_string(depth_) + "]; feed inputs as wide as the weight");
  Operands operands{};
  operands.shared_bias = CheckBias(bias);
  // The tensor exists, so the product of its dimensions fits memory and int64.
  operands.rows = 1;
  for (size_t i = 0; i + 1 < dims.size(); ++i) operands.rows *= dims[i];
  dims.back() = outputs_;
  abi::Value* y = nullptr;
  abi::Check(api_.Output(context, 0, dims.data(), dims.size(), &y));
  if (operands.rows == 0) return operands;
  operands.x = abi::Data<float>(api_, x);
  operands.bias = abi::Data<float>(api_, bias);
  void* y_data = nullptr;
  abi::Check(api_.TensorData(y, &y_data));
  operands.y = static_cast<float*>(y_data);
  return operands;
}

void Product::InferShape(const abi::Api& api, abi::ShapeContext* context) {
  std::optional<SymbolicShape> shape = ReadInputShape(api, context, kX);
  const int64_t outputs = ReadIntAttribute(api, context, "N");
  if (!shape || shape->dims.empty() || outputs < 1) return;
  shape->dims.back() = outputs;
  shape->symbols.back() = "";
  WriteOutputShape(api, context, *shape);
}

bool Product::CheckBias(const abi::Value* bias) const {
  const abi::Shape shape = abi::ReadShape(api_, bias);
  const bool fits = shape.dims.size() == 1 && (shape.dims[0] == outputs_ || shape.dims[0] == 1);
  if (!fits || shape.type != abi::ElementType::kFloat)
    Refuse(title_, InputTitle(bias_input_, "bias") + " is " + TypeName(shape.type) + " " +
                       ShapeText(shape.dims) + ", expected float32 [" + std::to_string(outputs_) +
                       "], or [1] for one value (zero: no bias)");
  return shape.dims[0] == 1;
}

}  // namespace onnxq::ops
