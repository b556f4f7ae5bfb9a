#include "ops/float8_round.h"

#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "kernels/dispatch.h"
#include "kernels/float8.h"
#include "ops/float8_tensors.h"
#include "ops/node.h"
#include "ops/op_base.h"

namespace onnxq::ops {
namespace {

constexpr size_t kX = 0;
constexpr size_t kScale = 1;

/// What both ops share: the kind, x and y.
class Float8Rounding {
 public:
  struct Operands {
    const float* x;
    float* y;
    int64_t count;
    std::vector<int64_t> dims;
  };

  Float8Rounding(const abi::Api& api, const abi::KernelInfo* info, const char* op)
      : api_(api), title_(NodeTitle(api, info, op)), kind_(ReadFloat8Kind(api, info, title_)) {
    CheckLayoutVersion(api, info, title_);
  }

  const abi::Api& api() const { return api_; }
  const std::string& title() const { return title_; }
  const kernels::Float8Kind& kind() const { return kind_; }

  /// Makes y and has round(operands, parallel) fill it.
  template <class F>
  void Compute(abi::KernelContext* context, const F& round) const {
    const abi::Value* x = RequiredInput(api_, context, title_, kX, "x");
    Operands operands{nullptr, nullptr, 1, abi::ReadShape(api_, x).dims};
    for (const int64_t dim : operands.dims) operands.count *= dim;
    abi::Value* y = nullptr;
    abi::Check(api_.Output(context, 0, operands.dims.data(), operands.dims.size(), &y));
    if (operands.count == 0) return;
    operands.x = abi::Data<float>(api_, x);
    void* y_data = nullptr;
    abi::Check(api_.TensorData(y, &y_data));
    operands.y = static_cast<float*>(y_data);
    SessionPool pool{api_, context};
    round(operands, pool.Interface());
    abi::Check(pool.status);
  }

  static void InferShape(const abi::Api& api, abi::ShapeContext* context) {
    const std::optional<SymbolicShape> shape = ReadInputShape(api, context, kX);
    // Rank 0 may also mean "not known" here: leave it open.
    if (shape && !shape->dims.empty()) WriteOutputShape(api, context, *shape);
  }

 private:
  abi::Api api_;
  std::string title_;
  const kernels::Float8Kind& kind_;
};

class Float8Round {
 public:
  static constexpr const char* kName = "Float8Round";
  static constexpr abi::ElementType kInputs[] = {abi::ElementType::kFloat, abi::ElementType::kFloat};

  Float8Round(const abi::Api& api, const abi::KernelInfo* info) : rounding_(api, info, kName) {
    if (const abi::Value* scale = ConstantInput(api, info, kScale)) ReadScale(scale);
  }

  const abi::Api& api() const { return rounding_.api(); }

  void Compute(abi::KernelContext* context) const {
    const float scale = ReadScale(RequiredInput(api(), context, rounding_.title(), kScale, "scale"));
    rounding_.Compute(context, [&](const Float8Rounding::Operands& o, const kernels::Parallel& parallel) {
      kernels::RoundFloat8(kernels::ChosenKernels(), rounding_.kind(), scale, o.x, o.count, o.y, parallel);
    });
  }

  static void InferShape(const abi::Api& api, abi::ShapeContext* context) {
    Float8Rounding::InferShape(api, context);
  }

 private:
  float ReadScale(const abi::Value* value) const {
    const abi::Shape found = abi::ReadShape(api(), value);
    if (found.type != abi::ElementType::kFloat ||
        !(found.dims.empty() || found.dims == std::vector<int64_t>{1}))
      Refuse(rounding_.title(), InputTitle(kScale, "scale") + " is " + TypeName(found.type) + " " +
                                    ShapeText(found.dims) + ", expected float32 [] or [1]" + kDamaged);
    const float scale = *abi::Data<float>(api(), value);
    if (!(scale > 0.0f) || !std::isfinite(scale))
      Refuse(rounding_.title(), InputTitle(kScale, "scale") + " is " + std::to_string(scale) +
                                    ", expected a finite number above 0; calibrate the model again");
    return scale;
  }

  Float8Rounding rounding_;
};

class Float8RoundTokens {
 public:
  static constexpr const char* kName = "Float8RoundTokens";
  static constexpr abi::ElementType kInputs[] = {abi::ElementType::kFloat};

  Float8RoundTokens(const abi::Api& api, const abi::KernelInfo* info) : rounding_(api, info, kName) {}

  const abi::Api& api() const { return rounding_.api(); }

  void Compute(abi::KernelContext* context) const {
    rounding_.Compute(context, [&](const Float8Rounding::Operands& o, const kernels::Parallel& parallel) {
      if (o.dims.empty()) Refuse(rounding_.title(), InputTitle(kX, "x") + " is [], expected [..., K]");
      kernels::RoundFloat8Rows(kernels::ChosenKernels(), rounding_.kind(), o.x, o.count / o.dims.back(),
                               o.dims.back(), o.y, parallel);
    });
  }

  static void InferShape(const abi::Api& api, abi::ShapeContext* context) {
    Float8Rounding::InferShape(api, context);
  }

 private:
  Float8Rounding rounding_;
};

}  // namespace

const abi::CustomOp& Float8RoundOp() {
  static const abi::CustomOp op = MakeOp<Float8Round>();
  return op;
}

const abi::CustomOp& Float8RoundTokensOp() {
  static const abi::CustomOp op = MakeOp<Float8RoundTokens>();
  return op;
}

}  // namespace onnxq::ops
