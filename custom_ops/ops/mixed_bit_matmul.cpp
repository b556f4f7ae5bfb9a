#include "ops/mixed_bit_matmul.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "kernels/dispatch.h"
#include "kernels/mixed.h"
#include "ops/node.h"
#include "ops/op_base.h"
#include "ops/product.h"

namespace onnxq::ops {
namespace {

using abi::ElementType;
using kernels::MixedLayout;

enum Input : size_t { kX, kPacked, kDepths, kColumns, kScales, kOrder, kTables, kSteps, kBias, kInputCount };

constexpr const char* kNames[kInputCount] = {"x",     "packed", "depths", "columns", "scales",
                                             "order", "tables", "steps",  "bias"};
constexpr int kLargestLevel = (1 << kernels::kTableLevelBits) - 1;
constexpr int kMostOrderedBits = 16;

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int Entries(int bits) { return 1 << std::max(bits, kernels::kMixedWindow); }

constexpr int AllEntries() {
  int count = 0;
  for (int bits = 1; bits <= kernels::kTableDepths; ++bits) count += Entries(bits);
  return count;
}

class MixedBitMatMul {
 public:
  static constexpr const char* kName = "MixedBitMatMul";
  static constexpr ElementType kInputs[kInputCount] = {
      ElementType::kFloat, ElementType::kUint8,   ElementType::kUint8,
      ElementType::kUint8, ElementType::kFloat16, ElementType::kUint16,
      ElementType::kUint8, ElementType::kFloat,   ElementType::kFloat};

  MixedBitMatMul(const abi::Api& api, const abi::KernelInfo* info)
      : api_(api),
        title_(NodeTitle(api, info, kName)),
        weight_(ReadWeightAttributes(api, info, title_, kMostOrderedBits)),
        tiles_(CeilDiv(weight_.outputs, kernels::kTileOutputs)),
        blocks_(CeilDiv(weight_.depth, kernels::kBlockDepth)),
        band_(ReadBand(info)),
        product_(api, info, title_, weight_.outputs, weight_.depth, kBias),
        activations_(ReadActivations(api, info, title_)) {
    if (const abi::Value* depths = ConstantInput(api, info, kDepths)) layout_.emplace(ReadDepths(depths));
    for (const Input input : {kPacked, kColumns, kScales, kOrder, kTables, kSteps}) {
      const abi::Value* value = ConstantInput(api, info, input);
      // How many bytes there must be depends on the depths.
      if (!value || (input == kPacked && !layout_)) continue;
      input == kPacked ? CheckPacked(value, *layout_) : CheckTensor(input, value);
      if (input == kTables) CheckLevels(abi::Data<uint8_t>(api, value));
      checked_[input] = true;
    }
  }

  const abi::Api& api() const { return api_; }

  void Compute(abi::KernelContext* context) const {
    const abi::Value* values[kInputCount] = {};
    for (size_t input = kPacked; input < kBias; ++input)
      values[input] = RequiredInput(api_, context, title_, input, kNames[input]);
    std::optional<MixedLayout> layout_now;
    if (!layout_) layout_now.emplace(ReadDepths(values[kDepths]));
    const MixedLayout& layout = layout_ ? *layout_ : *layout_now;
    if (!checked_[kPacked]) CheckPacked(values[kPacked], layout);
    for (const Input input : {kColumns, kScales, kOrder, kTables, kSteps})
      if (!checked_[input]) CheckTensor(input, values[input]);

    alignas(64) uint8_t tables[kernels::kTableDepths * kernels::kTableEntries];
    SpreadTables(abi::Data<uint8_t>(api_, values[kTables]), tables);
    kernels::MixedWeight weight{.layout = layout,
                                .packed = abi::Data<uint8_t>(api_, values[kPacked]),
                                .columns = abi::Data<uint8_t>(api_, values[kColumns]),
                                .scales = abi::Data<uint16_t>(api_, values[kScales]),
                                .order = abi::Data<uint16_t>(api_, values[kOrder]),
                                .tables = tables,
                                .steps = abi::Data<float>(api_, values[kSteps]),
                                .bias = nullptr,
                                .shared_bias = false,
                                .gain = weight_.gain};
    product_.Compute(context, [&](const Product::Operands& o, const kernels::Parallel& parallel) {
      weight.bias = o.bias;
      weight.shared_bias = o.shared_bias;
      return kernels::MatMulMixed(kernels::ChosenKernels(), weight, activations_, o.x, o.rows, o.y, parallel);
    });
  }

  static void InferShape(const abi::Api& api, abi::ShapeContext* context) {
    Product::InferShape(api, context);
  }

 private:
  /// Clamped to the tiles that there are, so that nothing computed with it overflows.
  int64_t ReadBand(const abi::KernelInfo* info) const {
    const int64_t band = IntAttribute(api_, info, title_, "band");
    if (band < kernels::kTileOutputs || band % kernels::kTileOutputs != 0)
      Refuse(title_, "attribute band is " + std::to_string(band) +
                         ", expected a positive multiple of 32 (N rounded up to 32 for a single band)");
    return std::min(band, tiles_ * kernels::kTileOutputs);
  }

  int64_t Bands() const { return CeilDiv(weight_.outputs, band_); }

  [[noreturn]] void RefuseInput(Input input, const std::string& what) const {
    Refuse(title_, InputTitle(input, kNames[input]) + " " + what + kDamaged);
  }

  void CheckShape(Input input, const abi::Value* value, const std::vector<int64_t>& expected,
                  const std::string& why) const {
    const abi::Shape found = abi::ReadShape(api_, value);
    if (found.type == kInputs[input] && found.dims == expected) return;
    RefuseInput(input, std::string("is ") + TypeName(found.type) + " " + ShapeText(found.dims) +
                           ", expected " + TypeName(kInputs[input]) + " " + ShapeText(expected) + why);
  }

  std::string ForShape() const {
    return " for N = " + std::to_string(weight_.outputs) + ", K = " + std::to_string(weight_.depth) +
           ", band = " + std::to_string(band_);
  }

  MixedLayout ReadDepths(const abi::Value* value) const {
    CheckShape(kDepths, value, {Bands(), blocks_}, ForShape());
    const uint8_t* depths = abi::Data<uint8_t>(api_, value);
    for (int64_t i = 0; i < Bands() * blocks_; ++i)
      if (depths[i] > kernels::kMaxDepth)
        RefuseInput(kDepths, "holds " + std::to_string(depths[i]) + " at position " + std::to_string(i) +
                                 ", expected depths of 0 to " + std::to_string(kernels::kMaxDepth));
    return MixedLayout(weight_.outputs, weight_.depth, band_, depths);
  }

  void CheckPacked(const abi::Value* value, const MixedLayout& layout) const {
    CheckShape(kPacked, value, {layout.packed_bytes}, ": as many bytes as the depths call for" + ForShape());
  }

  void CheckTensor(Input input, const abi::Value* value) const {
    switch (input) {
      case kColumns:
        return CheckShape(input, value, {Bands(), blocks_ * kernels::kBlockDepth}, ForShape());
      case kScales:
        return CheckShape(input, value, {tiles_, 1, kernels::kTileOutputs}, ForShape());
      case kOrder:
        CheckShape(input, value, {weight_.depth}, ForShape());
        return CheckOrder(abi::Data<uint16_t>(api_, value));
      case kTables:
        return CheckShape(input, value, {AllEntries()}, ", the levels of depths 1 to 6");
      default:
        CheckShape(input, value, {kernels::kMaxDepth + 1}, ", one for each depth");
        return CheckSteps(abi::Data<float>(api_, value));
    }
  }

  void CheckOrder(const uint16_t* order) const {
    std::vector<bool> named(size_t(weight_.depth), false);
    for (int64_t p = 0; p < weight_.depth; ++p) {
      if (order[p] >= weight_.depth || named[order[p]])
        RefuseInput(kOrder, "holds " + std::to_string(order[p]) + (order[p] < weight_.depth ? " again" : "") +
                                " at position " + std::to_string(p) + ", expected each of 0 to " +
                                std::to_string(weight_.depth - 1) + " once");
      named[order[p]] = true;
    }
  }

  void CheckSteps(const float* steps) const {
    for (int bits = 0; bits <= kernels::kMaxDepth; ++bits)
      if (!std::isfinite(steps[bits]))
        RefuseInput(kSteps,
                    "holds something at position " + std::to_string(bits) + " that is not a finite number");
  }

  void CheckLevels(const uint8_t* levels) const {
    for (int i = 0; i < AllEntries(); ++i)
      if (levels[i] > kLargestLevel)
        RefuseInput(kTables, "holds " + std::to_string(levels[i]) + " at position " + std::to_string(i) +
                                 ", expected levels of 0 to " + std::to_string(kLargestLevel));
  }

  /// Each table repeated to the size that kernels read.
  static void SpreadTables(const uint8_t* levels, uint8_t* tables) {
    for (int bits = 1; bits <= kernels::kTableDepths; levels += Entries(bits), ++bits)
      for (int i = 0; i < kernels::kTableEntries; ++i)
        *tables++ = levels[i & (Entries(bits) - 1)] & kLargestLevel;
  }

  abi::Api api_;
  std::string title_;
  WeightAttributes weight_;
  int64_t tiles_;
  int64_t blocks_;
  int64_t band_;
  Product product_;
  kernels::Activations activations_;
  std::optional<MixedLayout> layout_;  ///< unless depths are only known at run time
  bool checked_[kInputCount] = {};
};

}  // namespace

const abi::CustomOp& MixedBitMatMulOp() {
  static const abi::CustomOp op = MakeOp<MixedBitMatMul>();
  return op;
}

}  // namespace onnxq::ops
