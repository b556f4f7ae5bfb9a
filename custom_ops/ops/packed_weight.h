// The part that LowBitMatMul and LowBitGather share: attributes and the three tensors of a packed weight,
// checked until nothing in them can make a kernel read out of bounds.
#pragma once

#include <string>
#include <vector>

#include "abi/ort_abi.h"
#include "abi/result.h"
#include "kernels/problem.h"

namespace onnxq::ops {

/// "LowBitMatMul node 'encoder/fc1'": how every message of this node begins.
std::string NodeTitle(const abi::Api& api, const abi::KernelInfo* info, const char* op);

int64_t IntAttribute(const abi::Api& api, const abi::KernelInfo* info, const std::string& title,
                     const char* name);
int64_t IntAttribute(const abi::Api& api, const abi::KernelInfo* info, const char* name, int64_t missing);

std::string ShapeText(const std::vector<int64_t>& dims);
const char* TypeName(abi::ElementType type);
[[noreturn]] void Refuse(const std::string& title, const std::string& what);

/// Attributes of one node and what follows from them.
class PackedWeight {
 public:
  /// Inputs first_input .. first_input + 2 are packed, scales, zero_points.
  PackedWeight(const abi::Api& api, const abi::KernelInfo* info, std::string title, size_t first_input);

  /// Fills in the pointers for one run; checks the tensors unless they are constants checked before.
  kernels::Weight Bind(const abi::KernelContext* context) const;

  const std::string& title() const { return title_; }
  int64_t outputs() const { return weight_.outputs; }
  int64_t depth() const { return weight_.depth; }

 private:
  void CheckTensor(size_t which, const abi::Value* value) const;

  abi::Api api_;
  std::string title_;
  size_t first_input_;
  kernels::Weight weight_{};
  std::vector<kernels::Segment> segments_;
  bool checked_[3] = {false, false, false};
};

}  // namespace onnxq::ops
