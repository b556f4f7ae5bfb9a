// The part that both ops on binary codes share: attributes and the four tensors of a weight of them, checked
// until nothing in them can make a kernel read out of bounds.
#pragma once

#include <string>
#include <vector>

#include "abi/ort_abi.h"
#include "kernels/binary.h"
#include "ops/node.h"

namespace onnxq::ops {

/// Inputs 1 (codes), 2 (scales), 3 (offsets) and 4 (rank) of a node.
class BinaryTensors {
 public:
  BinaryTensors(const abi::Api& api, const abi::KernelInfo* info, std::string title);

  /// Fills in the pointers for one run, but for the bias; checks the tensors unless they are constants
  /// checked before.
  kernels::BinaryWeight Bind(const abi::KernelContext* context) const;

  const abi::Api& api() const { return api_; }
  const std::string& title() const { return title_; }
  int64_t outputs() const { return weight_.outputs; }
  int64_t depth() const { return weight_.depth; }

 private:
  static constexpr size_t kTensors = 4;

  void ReadPlanes(const abi::KernelInfo* info);
  void ReadGroups(const abi::KernelInfo* info);
  int64_t Tiles(int plane) const;
  void CheckTensor(size_t which, const abi::Value* value) const;
  void CheckRank(const abi::Value* value) const;
  [[noreturn]] void RefuseInput(size_t which, const std::string& what) const;

  abi::Api api_;
  std::string title_;
  kernels::BinaryWeight weight_{};
  std::vector<int64_t> plane_rows_;
  int64_t plane_tiles_ = 0;  ///< of all planes together
  bool checked_[kTensors] = {};
};

}  // namespace onnxq::ops
