// What the products with a packed weight share: y = x @ W.T + bias, whatever W's codes stand for.
#pragma once

#include <string>

#include "abi/ort_abi.h"
#include "kernels/matmul.h"
#include "ops/packed_weight.h"

namespace onnxq::ops {

class PackedMatMul {
 public:
  PackedMatMul(const abi::Api& api, const abi::KernelInfo* info, const char* op, const WeightInputs& inputs,
               size_t bias_input);

  const abi::Api& api() const { return api_; }
  const PackedWeight& weight() const { return weight_; }

  /// `weight` comes from weight().Bind; its bias is filled in here.
  void Compute(abi::KernelContext* context, kernels::Weight weight) const;

  static void InferShape(const abi::Api& api, abi::ShapeContext* context);

 private:
  /// True when one value serves every output.
  bool CheckBias(const abi::Value* bias) const;

  abi::Api api_;
  PackedWeight weight_;
  kernels::Activations activations_;
  size_t bias_input_;
};

}  // namespace onnxq::ops
