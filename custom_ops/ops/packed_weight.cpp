#include "ops/packed_weight.h"

#include <algorithm>
#include <utility>

#include "kernels/matmul.h"

namespace onnxq::ops {
namespace {

constexpr const char* kInputNames[3] = {"packed", "scales", "zero_points"};
int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

PackedWeight::PackedWeight(const abi::Api& api, const abi::KernelInfo* info, std::string title,
                           const WeightInputs& inputs)
    : api_(api), title_(std::move(title)), inputs_{inputs.packed, inputs.scales, inputs.zero_points} {
  const WeightAttributes attributes = ReadWeightAttributes(api, info, title_);
  const int64_t bits = IntAttribute(api, info, title_, "bits");
  if (bits < 1 || bits > inputs.most_bits)
    Refuse(title_, "attribute bits is " + std::to_string(bits) + ", expected 1 to " +
                       std::to_string(inputs.most_bits));
  const int64_t group_size = IntAttribute(api, info, title_, "group_size");
  if (group_size < kernels::kBlockDepth || group_size % kernels::kBlockDepth != 0)
    Refuse(title_, "attribute group_size is " + std::to_string(group_size) +
                       ", expected a positive multiple of 32 (K rounded up to 32 for one scale per column)");
  weight_.bits = int(bits);
  weight_.gain = attributes.gain;
  weight_.outputs = attributes.outputs;
  weight_.depth = attributes.depth;
  weight_.tiles = CeilDiv(weight_.outputs, kernels::kTileOutputs);
  weight_.blocks = CeilDiv(weight_.depth, kernels::kBlockDepth);
  // A larger group is one group; clamping keeps sums of group_size inside int64.
  const int64_t group = std::min(group_size, weight_.blocks * kernels::kBlockDepth);
  weight_.group_blocks = group / kernels::kBlockDepth;
  weight_.groups = CeilDiv(weight_.blocks, weight_.group_blocks);

  for (size_t which = 0; which < 3; ++which) {
    const abi::Value* value = ConstantInput(api, info, inputs_[which]);
    if (!value) continue;
    CheckTensor(which, value);
    checked_[which] = true;
  }
  // After the checks: a file that lies about K must not make us build a long table first.
  segments_ = kernels::MakeSegments(weight_.depth, group, &weight_.activation_depth);
  weight_.segments = segments_.data();
  weight_.segment_count = int64_t(segments_.size());
}

void PackedWeight::CheckTensor(size_t which, const abi::Value* value) const {
  const kernels::Weight& w = weight_;
  const std::vector<int64_t> expected[3] = {
      {w.tiles, w.blocks, w.bits, kernels::kTileOutputs, 4},
      {w.tiles, w.groups, kernels::kTileOutputs},
      {w.tiles, w.groups, kernels::kTileOutputs},
  };
  const abi::ElementType type = which == 1 ? abi::ElementType::kFloat16 : abi::ElementType::kUint8;
  const abi::Shape found = abi::ReadShape(api_, value);
  const bool shared_zero = which == 2 && found.dims == std::vector<int64_t>{1, 1, 1};
  if (found.type == type && (shared_zero || found.dims == expected[which])) return;
  Refuse(title_, InputTitle(inputs_[which], kInputNames[which]) + " is " + TypeName(found.type) + " " +
                     ShapeText(found.dims) + ", expected " + TypeName(type) + " " +
                     ShapeText(expected[which]) + (which == 2 ? " or [1, 1, 1]" : "") +
                     " for N = " + std::to_string(w.outputs) + ", K = " + std::to_string(w.depth) +
                     ", bits = " + std::to_string(w.bits) +
                     ", group_size = " + std::to_string(w.group_blocks * kernels::kBlockDepth) + kDamaged);
}

kernels::Weight PackedWeight::Bind(const abi::KernelContext* context) const {
  const abi::Value* values[3] = {};
  for (size_t which = 0; which < 3; ++which) {
    values[which] = RequiredInput(api_, context, title_, inputs_[which], kInputNames[which]);
    if (!checked_[which]) CheckTensor(which, values[which]);
  }
  kernels::Weight weight = weight_;
  weight.packed = abi::Data<uint8_t>(api_, values[0]);
  weight.scales = abi::Data<uint16_t>(api_, values[1]);
  weight.zeros = abi::Data<uint8_t>(api_, values[2]);
  const std::vector<int64_t> zero_dims = abi::ReadShape(api_, values[2]).dims;
  weight.shared_zero = zero_dims == std::vector<int64_t>{1, 1, 1};
  return weight;
}

}  // namespace onnxq::ops
