// What all look-ups share: rows of W by index, whatever W is made of.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "abi/ort_abi.h"
#include "kernels/tasks.h"
#include "ops/op_base.h"

namespace onnxq::ops {

class Lookup {
 public:
  // kUndefined lets ONNX Runtime pass any index type; Compute takes int32 and int64.
  static constexpr abi::ElementType kIndexType = abi::ElementType::kUndefined;

  /// Indices are input 0.
  Lookup(const abi::Api& api, std::string title, int64_t outputs, int64_t depth);

  /// Checks the indices, makes y, and has decode(row, out) write each row of it.
  template <class F>
  void Compute(abi::KernelContext* context, const F& decode) const {
    Rows<F> rows{decode, Bind(context), depth_};
    const size_t count = rows.operands.indices.size();
    if (count == 0) return;
    SessionPool pool{api_, context};
    kernels::RunTasks(pool.Interface(), DecodeTask<F>, kernels::CeilDiv(int64_t(count), rows.step()), &rows);
    abi::Check(pool.status);
  }

  static void InferShape(const abi::Api& api, abi::ShapeContext* context);

 private:
  struct Operands {
    std::vector<int64_t> indices;  ///< inside [0, N)
    float* y;                      ///< [indices, K]
  };

  template <class F>
  struct Rows {
    const F& decode;
    Operands operands;
    int64_t depth;
    int64_t step() const { return std::max<int64_t>(1, kernels::kTaskElements / depth); }
  };

  template <class F>
  static void DecodeTask(void* argument, size_t task) {
    const Rows<F>& rows = *static_cast<const Rows<F>*>(argument);
    const int64_t begin = int64_t(task) * rows.step();
    const int64_t end = std::min(begin + rows.step(), int64_t(rows.operands.indices.size()));
    for (int64_t i = begin; i < end; ++i)
      rows.decode(rows.operands.indices[size_t(i)], rows.operands.y + i * rows.depth);
  }

  Operands Bind(abi::KernelContext* context) const;
  std::vector<int64_t> ReadIndices(const abi::Value* input, const abi::Shape& shape) const;

  abi::Api api_;
  std::string title_;
  int64_t outputs_;
  int64_t depth_;
};

}  // namespace onnxq::ops
