// The part that all ops on 8-bit floats share: which kind they are, and the attributes and two tensors of a
// weight of them, checked until nothing in them can make a kernel read out of bounds.
#pragma once

#include <string>

#include "abi/ort_abi.h"
#include "kernels/problem.h"
#include "ops/node.h"

namespace onnxq::ops {

/// The kind that attributes mantissa_bits and exponent_bias name.
const kernels::Float8Kind& ReadFloat8Kind(const abi::Api& api, const abi::KernelInfo* info,
                                          const std::string& title);

/// Inputs 1 (codes) and 2 (scales) of a node.
class Float8Tensors {
 public:
  Float8Tensors(const abi::Api& api, const abi::KernelInfo* info, std::string title);

  /// Fills in the pointers for one run, but for the bias; checks the tensors unless they are constants
  /// checked before.
  kernels::Float8Weight Bind(const abi::KernelContext* context) const;

  const abi::Api& api() const { return api_; }
  const std::string& title() const { return title_; }
  int64_t outputs() const { return weight_.outputs; }
  int64_t depth() const { return weight_.depth; }

 private:
  void ReadGroups(const abi::KernelInfo* info);
  void CheckCodes(const abi::Value* value) const;
  /// True when one scale serves the whole weight.
  bool CheckScales(const abi::Value* value) const;
  [[noreturn]] void RefuseInput(size_t input, const char* name, const abi::Shape& found,
                                const std::string& expected) const;

  abi::Api api_;
  std::string title_;
  kernels::Float8Weight weight_{};
  bool codes_checked_ = false;
};

}  // namespace onnxq::ops
