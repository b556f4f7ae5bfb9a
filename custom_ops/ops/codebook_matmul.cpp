#include "ops/codebook_matmul.h"

#include <string>

#include "ops/op_base.h"
#include "ops/packed_matmul.h"

namespace onnxq::ops {
namespace {

constexpr size_t kTable = 2;
constexpr size_t kBias = 5;
constexpr int kLargestLevel = (1 << kernels::kTableLevelBits) - 1;

class CodebookMatMul {
 public:
  static constexpr const char* kName = "CodebookMatMul";
  static constexpr abi::ElementType kInputs[] = {abi::ElementType::kFloat, abi::ElementType::kUint8,
                                                 abi::ElementType::kUint8, abi::ElementType::kFloat16,
                                                 abi::ElementType::kUint8, abi::ElementType::kFloat};

  CodebookMatMul(const abi::Api& api, const abi::KernelInfo* info)
      : product_(api, info, kName,
                 {.packed = 1, .scales = 3, .zero_points = 4, .most_bits = kernels::kMaxCodebookBits}, kBias),
        window_(ReadWindow(info)) {
    const abi::Value* table = ConstantInput(api, info, kTable);
    if (!table) return;
    CheckTable(table);
    const uint8_t* entries = abi::Data<uint8_t>(api, table);
    for (int i = 0; i < 1 << window_; ++i)
      if (entries[i] > kLargestLevel)
        Refuse(title(), "input 2 (table) holds " + std::to_string(entries[i]) + " at position " +
                            std::to_string(i) + ", expected levels of 0 to " + std::to_string(kLargestLevel) +
                            kDamaged);
  }

  const abi::Api& api() const { return product_.api(); }

  void Compute(abi::KernelContext* context) const {
    const abi::Value* table = RequiredInput(api(), context, title(), kTable, "table");
    CheckTable(table);
    const uint8_t* entries = abi::Data<uint8_t>(api(), table);
    alignas(64) uint8_t levels[kernels::kTableEntries];
    for (int i = 0; i < kernels::kTableEntries; ++i)
      levels[i] = entries[i & ((1 << window_) - 1)] & kLargestLevel;
    kernels::Weight weight = product_.weight().Bind(context);
    weight.table = levels;
    weight.window = window_;
    product_.Compute(context, weight);
  }

  static void InferShape(const abi::Api& api, abi::ShapeContext* context) {
    Product::InferShape(api, context);
  }

 private:
  const std::string& title() const { return product_.weight().title(); }

  int ReadWindow(const abi::KernelInfo* info) const {
    const int64_t bits = product_.weight().bits();
    const int64_t window = IntAttribute(api(), info, title(), "window");
    if (window < bits || window > kernels::kMaxWindow)
      Refuse(title(), "attribute window is " + std::to_string(window) + ", expected " + std::to_string(bits) +
                          " (bits) to " + std::to_string(kernels::kMaxWindow));
    return int(window);
  }

  void CheckTable(const abi::Value* table) const {
    const abi::Shape found = abi::ReadShape(api(), table);
    const std::vector<int64_t> expected{int64_t{1} << window_};
    if (found.type == abi::ElementType::kUint8 && found.dims == expected) return;
    Refuse(title(), std::string("input 2 (table) is ") + TypeName(found.type) + " " + ShapeText(found.dims) +
                        ", expected uint8 " + ShapeText(expected) +
                        " for window = " + std::to_string(window_) + kDamaged);
  }

  PackedMatMul product_;
  int window_;
};

}  // namespace

const abi::CustomOp& CodebookMatMulOp() {
  static const abi::CustomOp op = MakeOp<CodebookMatMul>();
  return op;
}

}  // namespace onnxq::ops
