#include "ops/binary_tensors.h"

#include <algorithm>
#include <utility>

#include "kernels/tasks.h"

namespace onnxq::ops {
namespace {

using abi::ElementType;
using kernels::CeilDiv;
using kernels::kBinaryHalf;
using kernels::kBinaryTile;
using kernels::kMaxPlanes;

constexpr size_t kFirst = 1;  // the input that the first tensor is
enum Tensor : size_t { kCodes, kScales, kOffsets, kRank };
constexpr const char* kNames[] = {"codes", "scales", "offsets", "rank"};
constexpr ElementType kTypes[] = {ElementType::kUint8, ElementType::kFloat16, ElementType::kFloat16,
                                  ElementType::kInt32};
const std::vector<int64_t> kOne = {1};

}  // namespace

BinaryTensors::BinaryTensors(const abi::Api& api, const abi::KernelInfo* info, std::string title)
    : api_(api), title_(std::move(title)) {
  const WeightAttributes attributes = ReadWeightAttributes(api, info, title_);
  weight_.gain = attributes.gain;
  weight_.outputs = attributes.outputs;
  weight_.depth = attributes.depth;
  weight_.tiles = CeilDiv(weight_.outputs, kBinaryTile);
  weight_.chunks =
      CeilDiv(weight_.depth, kernels::kBlockDepth) * (kernels::kBlockDepth / kernels::kChunkDepth);
  ReadPlanes(info);
  ReadGroups(info);
  for (size_t which = 0; which < kTensors; ++which) {
    const abi::Value* value = ConstantInput(api, info, kFirst + which);
    if (!value) continue;
    CheckTensor(which, value);
    checked_[which] = true;
  }
}

void BinaryTensors::ReadPlanes(const abi::KernelInfo* info) {
  plane_rows_ = IntsAttribute(api_, info, title_, "plane_rows");
  const std::string found = "attribute plane_rows is " + ShapeText(plane_rows_) + ", expected ";
  if (plane_rows_.empty() || plane_rows_.size() > size_t{kMaxPlanes})
    Refuse(title_, found + "1 to " + std::to_string(kMaxPlanes) + " numbers of rows, one for each plane");
  if (plane_rows_[0] != weight_.outputs)
    Refuse(title_, found + std::to_string(weight_.outputs) + " (N) first: every row has a plane");
  for (size_t p = 0; p < plane_rows_.size(); ++p) {
    if (plane_rows_[p] < 1 || (p > 0 && plane_rows_[p] > plane_rows_[p - 1]))
      Refuse(title_, found + "numbers of rows that don't rise, down to 1");
    weight_.planes[p].rows = plane_rows_[p];
    plane_tiles_ += Tiles(int(p));
  }
  weight_.plane_count = int(plane_rows_.size());
}

void BinaryTensors::ReadGroups(const abi::KernelInfo* info) {
  const int64_t size = IntAttribute(api_, info, title_, "group_size");
  if (size < kernels::kBlockDepth || size % kernels::kBlockDepth != 0)
    Refuse(title_, "attribute group_size is " + std::to_string(size) +
                       ", expected a positive multiple of 32 (K rounded up to 32 for one group)");
  // A larger group is one group; clamping keeps sums of group_size inside int64.
  weight_.group_depth = std::min(size, weight_.chunks * kernels::kChunkDepth);
  weight_.groups = CeilDiv(weight_.depth, weight_.group_depth);
  weight_.group_tables = CeilDiv(weight_.group_depth, kernels::kTableDepth);
}

int64_t BinaryTensors::Tiles(int plane) const { return CeilDiv(weight_.planes[plane].rows, kBinaryTile); }

void BinaryTensors::CheckTensor(size_t which, const abi::Value* value) const {
  const std::vector<int64_t> expected[kTensors] = {{plane_tiles_ * weight_.chunks * kBinaryHalf},
                                                   {plane_tiles_ * weight_.groups * kBinaryTile},
                                                   {weight_.tiles, weight_.groups, kBinaryTile},
                                                   {weight_.outputs}};
  const abi::Shape found = abi::ReadShape(api_, value);
  const bool one = (which == kOffsets || which == kRank) && found.dims == kOne;
  if (found.type != kTypes[which] || (!one && found.dims != expected[which]))
    RefuseInput(which, std::string("is ") + TypeName(found.type) + " " + ShapeText(found.dims) +
                           ", expected " + TypeName(kTypes[which]) + " " + ShapeText(expected[which]) +
                           (which == kOffsets ? ", or [1] for none" : "") +
                           (which == kRank ? ", or [1] for rows that lie as they are" : "") + " for N = " +
                           std::to_string(weight_.outputs) + ", K = " + std::to_string(weight_.depth) +
                           ", plane_rows = " + ShapeText(plane_rows_) +
                           ", group_size = " + std::to_string(weight_.group_depth));
  if (which == kOffsets && one && (*abi::Data<uint16_t>(api_, value) & 0x7fff) != 0)
    RefuseInput(which, "is one value that is not zero, expected " + ShapeText(expected[which]) +
                           ", or [1] holding zero for none");
  if (which == kRank) CheckRank(value);
}

void BinaryTensors::CheckRank(const abi::Value* value) const {
  const int32_t* rank = abi::Data<int32_t>(api_, value);
  const bool one = abi::ReadShape(api_, value).dims == kOne;
  if (one && rank[0] == -1) return;
  if (one && weight_.outputs > 1)
    RefuseInput(kRank, "is [1] and holds " + std::to_string(rank[0]) +
                           ", expected -1 for rows that lie as they are, or one place for each row");
  for (int64_t n = 0; n < weight_.outputs; ++n)
    if (rank[n] < 0 || rank[n] >= weight_.outputs)
      RefuseInput(kRank, "holds " + std::to_string(rank[n]) + " at position " + std::to_string(n) +
                             ", expected 0 to " + std::to_string(weight_.outputs - 1));
}

void BinaryTensors::RefuseInput(size_t which, const std::string& what) const {
  Refuse(title_, InputTitle(kFirst + which, kNames[which]) + " " + what + kDamaged);
}

kernels::BinaryWeight BinaryTensors::Bind(const abi::KernelContext* context) const {
  const abi::Value* values[kTensors] = {};
  for (size_t which = 0; which < kTensors; ++which) {
    values[which] = RequiredInput(api_, context, title_, kFirst + which, kNames[which]);
    if (!checked_[which]) CheckTensor(which, values[which]);
  }
  kernels::BinaryWeight weight = weight_;
  const uint8_t* codes = abi::Data<uint8_t>(api_, values[kCodes]);
  const uint16_t* scales = abi::Data<uint16_t>(api_, values[kScales]);
  for (int p = 0; p < weight.plane_count; ++p) {
    weight.planes[p].codes = codes;
    weight.planes[p].scales = scales;
    codes += Tiles(p) * weight.chunks * kBinaryHalf;
    scales += Tiles(p) * weight.groups * kBinaryTile;
  }
  // One zero says that there are none; a weight of one tile and group has 64.
  if (abi::ReadShape(api_, values[kOffsets]).dims != kOne)
    weight.offsets = abi::Data<uint16_t>(api_, values[kOffsets]);
  const int32_t* rank = abi::Data<int32_t>(api_, values[kRank]);
  if (rank[0] != -1) weight.rank = rank;
  return weight;
}

}  // namespace onnxq::ops
