#include "ops/low_bit_gather.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>

#include "kernels/gather.h"
#include "ops/op_base.h"
#include "ops/packed_weight.h"

namespace onnxq::ops {
namespace {

constexpr size_t kIndices = 0;
// Elements that one task decodes: enough to pay for handing it to a thread.
constexpr int64_t kTaskElements = 1 << 15;

struct Rows {
  const kernels::Weight& weight;
  const std::vector<int64_t>& indices;
  float* y;
  int64_t step;
};

void DecodeTask(void* argument, size_t task) {
  const Rows& rows = *static_cast<const Rows*>(argument);
  const size_t begin = task * size_t(rows.step);
  const size_t end = std::min(begin + size_t(rows.step), rows.indices.size());
  for (size_t i = begin; i < end; ++i)
    kernels::DecodeRow(rows.weight, rows.indices[i], rows.y + int64_t(i) * rows.weight.depth);
}

class LowBitGather {
 public:
  static constexpr const char* kName = "LowBitGather";
  // kUndefined lets ONNX Runtime pass any index type; Compute takes int32 and int64.
  static constexpr abi::ElementType kInputs[] = {abi::ElementType::kUndefined, abi::ElementType::kUint8,
                                                 abi::ElementType::kFloat16, abi::ElementType::kUint8};

  LowBitGather(const abi::Api& api, const abi::KernelInfo* info)
      : api_(api),
        weight_(api, info, NodeTitle(api, info, kName), {.packed = 1, .scales = 2, .zero_points = 3}) {}

  const abi::Api& api() const { return api_; }

  void Compute(abi::KernelContext* context) const {
    const abi::Value* input = nullptr;
    abi::Check(api_.Input(context, kIndices, &input));
    if (!input) Refuse(weight_.title(), "input 0 (indices) is missing");
    abi::Shape shape = abi::ReadShape(api_, input);
    const std::vector<int64_t> indices = ReadIndices(input, shape);
    const kernels::Weight weight = weight_.Bind(context);
    shape.dims.push_back(weight.depth);
    abi::Value* y = nullptr;
    abi::Check(api_.Output(context, 0, shape.dims.data(), shape.dims.size(), &y));
    if (indices.empty()) return;
    void* y_data = nullptr;
    abi::Check(api_.TensorData(y, &y_data));
    Rows rows{weight, indices, static_cast<float*>(y_data),
              std::max<int64_t>(1, kTaskElements / weight.depth)};
    const size_t tasks = (indices.size() + size_t(rows.step) - 1) / size_t(rows.step);
    if (tasks == 1) return DecodeTask(&rows, 0);
    abi::Check(api_.ParallelFor(context, DecodeTask, tasks, 0, &rows));
  }

  static void InferShape(const abi::Api& api, abi::ShapeContext* context) {
    std::optional<SymbolicShape> shape = ReadInputShape(api, context, kIndices);
    const int64_t depth = ReadIntAttribute(api, context, "K");
    // Rank 0 may also mean "not known" here: leave it open.
    if (!shape || shape->dims.empty() || depth < 1) return;
    shape->dims.push_back(depth);
    shape->symbols.push_back("");
    WriteOutputShape(api, context, *shape);
  }

 private:
  /// Every index inside [0, N).
  std::vector<int64_t> ReadIndices(const abi::Value* input, const abi::Shape& shape) const {
    const bool wide = shape.type == abi::ElementType::kInt64;
    if (!wide && shape.type != abi::ElementType::kInt32)
      Refuse(weight_.title(),
             std::string("input 0 (indices) is ") + TypeName(shape.type) + ", expected int64 or int32");
    size_t count = 1;
    for (const int64_t dim : shape.dims) count *= size_t(dim);
    std::vector<int64_t> indices(count);
    if (count == 0) return indices;
    const void* data = abi::Data<void>(api_, input);
    const int64_t rows = weight_.outputs();
    for (size_t i = 0; i < count; ++i) {
      const int64_t raw = wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
      if (raw < -rows || raw >= rows)
        Refuse(weight_.title(), "input 0 (indices) holds " + std::to_string(raw) + " at position " +
                                    std::to_string(i) + ", expected " + std::to_string(-rows) + " to " +
                                    std::to_string(rows - 1) +
                                    "; check the tokenizer against the vocabulary");
      indices[i] = raw < 0 ? raw + rows : raw;
    }
    return indices;
  }

  abi::Api api_;
  PackedWeight weight_;
};

}  // namespace

const abi::CustomOp& LowBitGatherOp() {
  static const abi::CustomOp op = MakeOp<LowBitGather>();
  return op;
}

}  // namespace onnxq::ops
