#include "ops/frame_transform.h"

#include <bit>
#include <optional>
#include <string>
#include <vector>

#include "kernels/dispatch.h"
#include "kernels/frame.h"
#include "ops/node.h"
#include "ops/op_base.h"

namespace onnxq::ops {
namespace {

constexpr size_t kX = 0;
constexpr size_t kSigns = 1;
constexpr size_t kBlock = 2;
constexpr int64_t kLongest = int64_t{1} << 24;
constexpr int64_t kWidestBlock = 4096;

bool IsPowerOfTwo(int64_t value) { return value >= 1 && std::has_single_bit(uint64_t(value)); }
bool InRange(int64_t value) { return value >= 1 && value <= kLongest; }

template <kernels::FrameDirection kDirection>
class FrameTransform {
 public:
  static constexpr bool kAnalysis = kDirection == kernels::FrameDirection::kAnalysis;
  static constexpr const char* kName = kAnalysis ? "FrameAnalysis" : "FrameSynthesis";
  static constexpr abi::ElementType kInputs[] = {abi::ElementType::kFloat, abi::ElementType::kUint8,
                                                 abi::ElementType::kFloat};

  FrameTransform(const abi::Api& api, const abi::KernelInfo* info)
      : api_(api), title_(NodeTitle(api, info, kName)) {
    ReadAttributes(info);
    // What is known now is checked and prepared now.
    if (const abi::Value* signs = ConstantInput(api, info, kSigns)) signs_ = ReadSigns(signs);
    if (const abi::Value* block = ConstantInput(api, info, kBlock)) frame_.emplace(ReadBlock(block));
  }

  const abi::Api& api() const { return api_; }

  void Compute(abi::KernelContext* context) const {
    const abi::Value* x = RequiredInput(api_, context, title_, kX, "x");
    std::vector<float> signs_now;
    if (signs_.empty()) signs_now = ReadSigns(RequiredInput(api_, context, title_, kSigns, "signs"));
    std::optional<kernels::Frame> frame_now;
    if (!frame_) frame_now.emplace(ReadBlock(RequiredInput(api_, context, title_, kBlock, "block")));
    const kernels::Frame& frame = frame_ ? *frame_ : *frame_now;

    std::vector<int64_t> dims = abi::ReadShape(api_, x).dims;
    if (dims.empty() || dims.back() != frame.inputs())
      Refuse(title_, "input 0 (x) is " + ShapeText(dims) + ", expected [..., " +
                         std::to_string(frame.inputs()) + "] for " + AttributesText() +
                         "; feed vectors as long as the frame");
    // The tensor exists, so the product of its dimensions fits memory and int64.
    int64_t rows = 1;
    for (size_t i = 0; i + 1 < dims.size(); ++i) rows *= dims[i];
    dims.back() = frame.outputs();
    abi::Value* y = nullptr;
    abi::Check(api_.Output(context, 0, dims.data(), dims.size(), &y));
    if (rows == 0) return;
    void* y_data = nullptr;
    abi::Check(api_.TensorData(y, &y_data));
    SessionPool pool{api_, context};
    const bool done = kernels::TransformFrames(
        kernels::ChosenKernels(), frame, signs_.empty() ? signs_now.data() : signs_.data(),
        abi::Data<float>(api_, x), rows, static_cast<float*>(y_data), pool.Interface());
    abi::Check(pool.status);
    if (!done)
      throw abi::Error{abi::ErrorCode::kFail,
                       title_ + ": out of memory for vectors of " + std::to_string(length_) + " values"};
  }

  static void InferShape(const abi::Api& api, abi::ShapeContext* context) {
    std::optional<SymbolicShape> shape = ReadInputShape(api, context, kX);
    if (!shape || shape->dims.empty()) return;
    const int64_t left = ReadIntAttribute(api, context, "left");
    const int64_t middle = ReadIntAttribute(api, context, "middle");
    const int64_t odd = ReadIntAttribute(api, context, "odd");
    if (!InRange(left) || !InRange(middle) || !InRange(odd) || !InRange(left * middle)) return;
    int64_t length = left * middle * odd;
    if constexpr (kAnalysis) {
      const std::optional<SymbolicShape> block = ReadInputShape(api, context, kBlock);
      const bool known = block && block->dims.size() == 2 && block->dims[0] >= 1 && block->dims[1] >= 1 &&
                         block->dims[1] <= kWidestBlock;
      length = known ? length / block->dims[0] * block->dims[1] : -1;
    }
    shape->dims.back() = length;
    shape->symbols.back() = "";
    WriteOutputShape(api, context, *shape);
  }

 private:
  void ReadAttributes(const abi::KernelInfo* info) {
    shape_.left = IntAttribute(api_, info, title_, "left");
    shape_.middle = IntAttribute(api_, info, title_, "middle");
    shape_.odd = IntAttribute(api_, info, title_, "odd");
    const bool fits = InRange(shape_.left) && InRange(shape_.middle) && InRange(shape_.odd) &&
                      InRange(shape_.left * shape_.middle) &&
                      InRange(shape_.left * shape_.middle * shape_.odd);
    if (!fits || !IsPowerOfTwo(shape_.left) || !IsPowerOfTwo(shape_.middle) || shape_.odd % 2 == 0)
      Refuse(title_, "attributes are " + AttributesText() +
                         ", expected left and middle powers of two, odd an odd number, and a product of at "
                         "most 2**24; the file is damaged or was edited: quantize the model again");
    length_ = shape_.left * shape_.middle * shape_.odd;
  }

  std::string AttributesText() const {
    return "left = " + std::to_string(shape_.left) + ", middle = " + std::to_string(shape_.middle) +
           ", odd = " + std::to_string(shape_.odd);
  }

  std::vector<float> ReadSigns(const abi::Value* value) const {
    const abi::Shape found = abi::ReadShape(api_, value);
    const std::vector<int64_t> expected = {(length_ + 7) / 8};
    if (found.type != abi::ElementType::kUint8 || found.dims != expected)
      Refuse(title_, std::string("input 1 (signs) is ") + TypeName(found.type) + " " + ShapeText(found.dims) +
                         ", expected uint8 " + ShapeText(expected) + ", one bit a value, for " +
                         AttributesText() + kDamaged);
    return kernels::UnpackSigns(abi::Data<uint8_t>(api_, value), length_);
  }

  kernels::Frame ReadBlock(const abi::Value* value) const {
    const abi::Shape found = abi::ReadShape(api_, value);
    const std::vector<int64_t>& dims = found.dims;
    const int64_t right = shape_.middle * shape_.odd;
    const bool fits = found.type == abi::ElementType::kFloat && dims.size() == 2 && dims[0] >= 1 &&
                      dims[0] <= dims[1] && dims[1] <= kWidestBlock && right % dims[0] == 0;
    if (!fits)
      Refuse(title_, std::string("input 2 (block) is ") + TypeName(found.type) + " " + ShapeText(dims) +
                         ", expected float32 [w, w'] with 1 <= w <= w' <= 4096 and w a divisor of " +
                         "middle * odd = " + std::to_string(right) + kDamaged);
    kernels::FrameShape shape = shape_;
    shape.narrow = dims[0];
    shape.wide = dims[1];
    return kernels::Frame(shape, kDirection, abi::Data<float>(api_, value), kernels::ChosenKernels().lanes);
  }

  abi::Api api_;
  std::string title_;
  kernels::FrameShape shape_{};
  int64_t length_ = 0;
  std::vector<float> signs_;             ///< empty unless constant
  std::optional<kernels::Frame> frame_;  ///< unless the block is only known at run time
};

}  // namespace

const abi::CustomOp& FrameAnalysisOp() {
  static const abi::CustomOp op = MakeOp<FrameTransform<kernels::FrameDirection::kAnalysis>>();
  return op;
}

const abi::CustomOp& FrameSynthesisOp() {
  static const abi::CustomOp op = MakeOp<FrameTransform<kernels::FrameDirection::kSynthesis>>();
  return op;
}

}  // namespace onnxq::ops
