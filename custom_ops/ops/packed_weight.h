// The part that all ops over packed weights share: attributes and the three tensors of a packed weight,
// checked until nothing in them can make a kernel read out of bounds.
#pragma once

#include <string>
#include <vector>

#include "abi/ort_abi.h"
#include "kernels/problem.h"
#include "ops/node.h"

namespace onnxq::ops {

/// Where a node keeps its weight, and how wide its codes may be.
struct WeightInputs {
  size_t packed;
  size_t scales;
  size_t zero_points;
  int most_bits = kernels::kMaxBits;
};

/// Attributes of one node and what follows from them.
class PackedWeight {
 public:
  PackedWeight(const abi::Api& api, const abi::KernelInfo* info, std::string title,
               const WeightInputs& inputs);

  /// Fills in the pointers for one run; checks the tensors unless they are constants checked before.
  kernels::Weight Bind(const abi::KernelContext* context) const;

  const std::string& title() const { return title_; }
  int64_t outputs() const { return weight_.outputs; }
  int64_t depth() const { return weight_.depth; }
  int bits() const { return weight_.bits; }

 private:
  void CheckTensor(size_t which, const abi::Value* value) const;

  abi::Api api_;
  std::string title_;
  size_t inputs_[3];  ///< packed, scales, zero_points
  kernels::Weight weight_{};
  std::vector<kernels::Segment> segments_;
  bool checked_[3] = {false, false, false};
};

}  // namespace onnxq::ops
