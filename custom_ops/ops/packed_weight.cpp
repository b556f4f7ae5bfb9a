#include "ops/packed_weight.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "kernels/matmul.h"

namespace onnxq::ops {
namespace {

constexpr const char* kInputNames[3] = {"packed", "scales", "zero_points"};
constexpr int64_t kLayoutVersion = 1;
// Keep every product of dimensions below far inside int64; no real weight comes near.
constexpr int64_t kMaxOutputs = int64_t{1} << 31;
constexpr int64_t kMaxDepth = int64_t{1} << 27;

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Releases ONNX Runtime's complaint about a missing attribute: the caller has a better one, or a default.
bool Found(const abi::Api& api, abi::Status* status) {
  if (!status) return true;
  api.ReleaseStatus(status);
  return false;
}

}  // namespace

std::string NodeTitle(const abi::Api& api, const abi::KernelInfo* info, const char* op) {
  size_t size = 0;
  Found(api, api.NodeName(info, nullptr, &size));
  std::string name(size, '\0');
  if (size > 0 && Found(api, api.NodeName(info, name.data(), &size))) {
    name.resize(size > 0 ? size - 1 : 0);  // the size counts the closing zero
  } else {
    name.clear();
  }
  return std::string("onnxq: ") + op + (name.empty() ? " node without a name" : " node '" + name + "'");
}

void Refuse(const std::string& title, const std::string& what) {
  throw abi::Error{abi::ErrorCode::kInvalidArgument, title + ": " + what};
}

int64_t IntAttribute(const abi::Api& api, const abi::KernelInfo* info, const std::string& title,
                     const char* name) {
  int64_t value = 0;
  if (!Found(api, api.AttributeInt(info, name, &value)))
    Refuse(title,
           std::string("the integer attribute '") + name + "' is missing; write the model again with onnxq");
  return value;
}

int64_t IntAttribute(const abi::Api& api, const abi::KernelInfo* info, const char* name, int64_t missing) {
  int64_t value = 0;
  return Found(api, api.AttributeInt(info, name, &value)) ? value : missing;
}

std::string ShapeText(const std::vector<int64_t>& dims) {
  std::string text = "[";
  for (const int64_t dim : dims) text += (text.size() > 1 ? ", " : "") + std::to_string(dim);
  return text + "]";
}

const char* TypeName(abi::ElementType type) {
  switch (type) {
    case abi::ElementType::kFloat:
      return "float32";
    case abi::ElementType::kUint8:
      return "uint8";
    case abi::ElementType::kInt32:
      return "int32";
    case abi::ElementType::kInt64:
      return "int64";
    case abi::ElementType::kFloat16:
      return "float16";
    default:
      return "another type";
  }
}

PackedWeight::PackedWeight(const abi::Api& api, const abi::KernelInfo* info, std::string title,
                           const WeightInputs& inputs)
    : api_(api), title_(std::move(title)), inputs_{inputs.packed, inputs.scales, inputs.zero_points} {
  const int64_t version = IntAttribute(api, info, "layout_version", kLayoutVersion);
  if (version != kLayoutVersion)
    Refuse(title_, "layout_version is " + std::to_string(version) +
                       ", but this library reads version 1; update onnxq, or quantize the model again");
  const int64_t bits = IntAttribute(api, info, title_, "bits");
  if (bits < 1 || bits > inputs.most_bits)
    Refuse(title_, "attribute bits is " + std::to_string(bits) + ", expected 1 to " +
                       std::to_string(inputs.most_bits));
  const int64_t group_size = IntAttribute(api, info, title_, "group_size");
  if (group_size < kernels::kBlockDepth || group_size % kernels::kBlockDepth != 0)
    Refuse(title_, "attribute group_size is " + std::to_string(group_size) +
                       ", expected a positive multiple of 32 (K rounded up to 32 for one scale per column)");
  const int64_t depth = IntAttribute(api, info, title_, "K");
  const int64_t outputs = IntAttribute(api, info, title_, "N");
  if (depth < 1 || depth > kMaxDepth || outputs < 1 || outputs > kMaxOutputs)
    Refuse(title_, "attributes N = " + std::to_string(outputs) + " and K = " + std::to_string(depth) +
                       " must be at least 1 and at most 2**31 and 2**27");
  float gain = 1.0f;
  if (!Found(api, api.AttributeFloat(info, "gain", &gain))) gain = 1.0f;
  if (!std::isfinite(gain)) Refuse(title_, "attribute gain is not a finite number");

  weight_.bits = int(bits);
  weight_.gain = gain;
  weight_.outputs = outputs;
  weight_.depth = depth;
  weight_.tiles = CeilDiv(outputs, kernels::kTileOutputs);
  weight_.blocks = CeilDiv(depth, kernels::kBlockDepth);
  // A larger group is one group; clamping keeps sums of group_size inside int64.
  const int64_t group = std::min(group_size, weight_.blocks * kernels::kBlockDepth);
  weight_.group_blocks = group / kernels::kBlockDepth;
  weight_.groups = CeilDiv(weight_.blocks, weight_.group_blocks);

  for (size_t which = 0; which < 3; ++which) {
    int is_constant = 0;
    const abi::Value* value = nullptr;
    if (!Found(api, api.ConstantInput(info, inputs_[which], &is_constant, &value))) continue;
    if (!is_constant || !value) continue;
    CheckTensor(which, value);
    checked_[which] = true;
  }
  // After the checks: a file that lies about K must not make us build a long table first.
  segments_ = kernels::MakeSegments(depth, group, &weight_.activation_depth);
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
  Refuse(title_, "input " + std::to_string(inputs_[which]) + " (" + kInputNames[which] + ") is " +
                     TypeName(found.type) + " " + ShapeText(found.dims) + ", expected " + TypeName(type) +
                     " " + ShapeText(expected[which]) + (which == 2 ? " or [1, 1, 1]" : "") +
                     " for N = " + std::to_string(w.outputs) + ", K = " + std::to_string(w.depth) +
                     ", bits = " + std::to_string(w.bits) +
                     ", group_size = " + std::to_string(w.group_blocks * kernels::kBlockDepth) +
                     "; the file is damaged or was edited: quantize the model again");
}

kernels::Weight PackedWeight::Bind(const abi::KernelContext* context) const {
  const abi::Value* values[3] = {};
  for (size_t which = 0; which < 3; ++which) {
    abi::Check(api_.Input(context, inputs_[which], &values[which]));
    if (!values[which])
      Refuse(title_, "input " + std::to_string(inputs_[which]) + " (" + kInputNames[which] + ") is missing");
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
