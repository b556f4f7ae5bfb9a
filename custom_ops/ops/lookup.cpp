#include "ops/lookup.h"

#include <optional>
#include <utility>

#include "ops/node.h"

namespace onnxq::ops {
namespace {

constexpr size_t kIndices = 0;

}  // namespace

Lookup::Lookup(const abi::Api& api, std::string title, int64_t outputs, int64_t depth)
    : api_(api), title_(std::move(title)), outputs_(outputs), depth_(depth) {}

void Lookup::InferShape(const abi::Api& api, abi::ShapeContext* context) {
  std::optional<SymbolicShape> shape = ReadInputShape(api, context, kIndices);
  const int64_t depth = ReadIntAttribute(api, context, "K");
  // Rank 0 may also mean "not known" here: leave it open.
  if (!shape || shape->dims.empty() || depth < 1) return;
  shape->dims.push_back(depth);
  shape->symbols.push_back("");
  WriteOutputShape(api, context, *shape);
}

Lookup::Operands Lookup::Bind(abi::KernelContext* context) const {
  const abi::Value* input = RequiredInput(api_, context, title_, kIndices, "indices");
  abi::Shape shape = abi::ReadShape(api_, input);
  Operands operands{ReadIndices(input, shape), nullptr};
  shape.dims.push_back(depth_);
  abi::Value* y = nullptr;
  abi::Check(api_.Output(context, 0, shape.dims.data(), shape.dims.size(), &y));
  if (operands.indices.empty()) return operands;
  void* y_data = nullptr;
  abi::Check(api_.TensorData(y, &y_data));
  operands.y = static_cast<float*>(y_data);
  return operands;
}

std::vector<int64_t> Lookup::ReadIndices(const abi::Value* input, const abi::Shape& shape) const {
  const bool wide = shape.type == abi::ElementType::kInt64;
  if (!wide && shape.type != abi::ElementType::kInt32)
    Refuse(title_, std::string("input 0 (indices) is ") + TypeName(shape.type) + ", expected int64 or int32");
  size_t count = 1;
  for (const int64_t dim : shape.dims) count *= size_t(dim);
  std::vector<int64_t> indices(count);
  if (count == 0) return indices;
  const void* data = abi::Data<void>(api_, input);
  for (size_t i = 0; i < count; ++i) {
    const int64_t raw = wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
    if (raw < -outputs_ || raw >= outputs_)
      Refuse(title_, "input 0 (indices) holds " + std::to_string(raw) + " at position " + std::to_string(i) +
                         ", expected " + std::to_string(-outputs_) + " to " + std::to_string(outputs_ - 1) +
                         "; check the tokenizer against the vocabulary");
    indices[i] = raw < 0 ? raw + outputs_ : raw;
  }
  return indices;
}

}  // namespace onnxq::ops
