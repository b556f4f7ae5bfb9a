// What all products share: y = x @ W.T + bias, whatever W is made of.
#pragma once

#include <string>

#include "abi/ort_abi.h"
#include "kernels/matmul.h"
#include "ops/op_base.h"

namespace onnxq::ops {

/// Attribute accuracy_level, of ops that know more than one kind of activations.
kernels::Activations ReadActivations(const abi::Api& api, const abi::KernelInfo* info,
                                     const std::string& title);

class Product {
 public:
  struct Operands {
    const float* x;  ///< [rows, K]
    int64_t rows;
    const float* bias;
    bool shared_bias;  ///< one value serves every output
    float* y;          ///< [rows, N]
  };

  /// x is input 0.
  Product(const abi::Api& api, const abi::KernelInfo* info, std::string title, int64_t outputs, int64_t depth,
          size_t bias_input);

  /// Checks x and bias, makes y, and has multiply(operands, parallel) fill it; false: out of memory.
  template <class F>
  void Compute(abi::KernelContext* context, const F& multiply) const {
    const Operands operands = Bind(context);
    if (operands.rows == 0) return;
    SessionPool pool{api_, context};
    const bool done = multiply(operands, pool.Interface());
    abi::Check(pool.status);
    if (!done)
      throw abi::Error{
          abi::ErrorCode::kFail,
          title_ + ": out of memory for " + std::to_string(operands.rows) + " rows; run smaller batches"};
  }

  static void InferShape(const abi::Api& api, abi::ShapeContext* context);

 private:
  Operands Bind(abi::KernelContext* context) const;
  /// True when one value serves every output.
  bool CheckBias(const abi::Value* bias) const;

  abi::Api api_;
  std::string title_;
  int64_t outputs_;
  int64_t depth_;
  size_t bias_input_;
};

}  // namespace onnxq::ops
