// What the products with a packed weight share, whatever its codes stand for.
#pragma once

#include "abi/ort_abi.h"
#include "kernels/problem.h"
#include "ops/packed_weight.h"
#include "ops/product.h"

namespace onnxq::ops {

class PackedMatMul {
 public:
  PackedMatMul(const abi::Api& api, const abi::KernelInfo* info, const char* op, const WeightInputs& inputs,
               size_t bias_input);

  const abi::Api& api() const { return api_; }
  const PackedWeight& weight() const { return weight_; }

  /// `weight` comes from weight().Bind; its bias is filled in here.
  void Compute(abi::KernelContext* context, kernels::Weight weight) const;

 private:
  abi::Api api_;
  PackedWeight weight_;
  Product product_;
  kernels::Activations activations_;
};

}  // namespace onnxq::ops
