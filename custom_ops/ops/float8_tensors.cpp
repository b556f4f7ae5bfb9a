#include "ops/float8_tensors.h"

#include <algorithm>
#include <utility>

#include "kernels/float8.h"
#include "kernels/tasks.h"

namespace onnxq::ops {
namespace {

constexpr size_t kCodes = 1;
constexpr size_t kScales = 2;

}  // namespace

const kernels::Float8Kind& ReadFloat8Kind(const abi::Api& api, const abi::KernelInfo* info,
                                          const std::string& title) {
  const int64_t mantissa_bits = IntAttribute(api, info, title, "mantissa_bits");
  const int64_t exponent_bias = IntAttribute(api, info, title, "exponent_bias");
  std::string known;
  for (const kernels::Float8Kind& kind : kernels::kFloat8Kinds) {
    if (kind.mantissa_bits == mantissa_bits && kind.exponent_bias == exponent_bias) return kind;
    known += (known.empty() ? "" : ", ") + std::to_string(kind.mantissa_bits) + " and " +
             std::to_string(kind.exponent_bias) + " (" + kind.name + ")";
  }
  Refuse(title, "attributes mantissa_bits and exponent_bias are " + std::to_string(mantissa_bits) + " and " +
                    std::to_string(exponent_bias) + ", expected one of " + known);
}

Float8Tensors::Float8Tensors(const abi::Api& api, const abi::KernelInfo* info, std::string title)
    : api_(api), title_(std::move(title)) {
  const WeightAttributes attributes = ReadWeightAttributes(api, info, title_);
  const kernels::Float8Kind& kind = ReadFloat8Kind(api, info, title_);
  weight_.gain = attributes.gain;
  weight_.outputs = attributes.outputs;
  weight_.depth = attributes.depth;
  weight_.mantissa_bits = kind.mantissa_bits;
  weight_.unit = kernels::Float8Unit(kind);
  ReadGroups(info);
  if (const abi::Value* codes = ConstantInput(api, info, kCodes)) {
    CheckCodes(codes);
    codes_checked_ = true;
  }
  if (const abi::Value* scales = ConstantInput(api, info, kScales)) CheckScales(scales);
}

void Float8Tensors::ReadGroups(const abi::KernelInfo* info) {
  const int64_t size = IntAttribute(api_, info, title_, "group_size");
  if (size < 1 || (size < weight_.depth && size % kernels::kBlockDepth != 0))
    Refuse(title_, "attribute group_size is " + std::to_string(size) +
                       ", expected a positive multiple of 32, or " + std::to_string(weight_.depth) +
                       " (K) for one scale per output");
  // A larger group is one group; clamping keeps sums of group_size inside int64.
  weight_.group_depth = std::min(size, weight_.depth);
  weight_.groups = kernels::CeilDiv(weight_.depth, weight_.group_depth);
}

void Float8Tensors::CheckCodes(const abi::Value* value) const {
  const std::vector<int64_t> expected = {weight_.outputs, weight_.depth};
  const abi::Shape found = abi::ReadShape(api_, value);
  if (found.type != abi::ElementType::kUint8 || found.dims != expected)
    RefuseInput(kCodes, "codes", found, std::string("uint8 ") + ShapeText(expected));
}

bool Float8Tensors::CheckScales(const abi::Value* value) const {
  const std::vector<int64_t> expected = {weight_.outputs, weight_.groups};
  const abi::Shape found = abi::ReadShape(api_, value);
  const bool shared = weight_.groups == 1 && found.dims == std::vector<int64_t>{1, 1};
  if (found.type != abi::ElementType::kFloat16 || (!shared && found.dims != expected))
    RefuseInput(kScales, "scales", found,
                "float16 " + ShapeText(expected) + (weight_.groups == 1 ? " or [1, 1]" : ""));
  return shared;
}

void Float8Tensors::RefuseInput(size_t input, const char* name, const abi::Shape& found,
                                const std::string& expected) const {
  Refuse(title_, InputTitle(input, name) + " is " + TypeName(found.type) + " " + ShapeText(found.dims) +
                     ", expected " + expected + " for N = " + std::to_string(weight_.outputs) +
                     ", K = " + std::to_string(weight_.depth) +
                     ", group_size = " + std::to_string(weight_.group_depth) + kDamaged);
}

kernels::Float8Weight Float8Tensors::Bind(const abi::KernelContext* context) const {
  const abi::Value* codes = RequiredInput(api_, context, title_, kCodes, "codes");
  const abi::Value* scales = RequiredInput(api_, context, title_, kScales, "scales");
  if (!codes_checked_) CheckCodes(codes);
  kernels::Float8Weight weight = weight_;
  weight.shared_scale = CheckScales(scales);
  weight.codes = abi::Data<uint8_t>(api_, codes);
  weight.scales = abi::Data<uint16_t>(api_, scales);
  return weight;
}

}  // namespace onnxq::ops
