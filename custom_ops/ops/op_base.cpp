#include "ops/op_base.h"

#include <atomic>
#include <string>

namespace onnxq::ops {

std::optional<SymbolicShape> ReadInputShape(const abi::Api& api, const abi::ShapeContext* context,
                                            size_t index) {
  size_t count = 0;
  abi::Check(api.ShapeInputCount(context, &count));
  if (index >= count) return std::nullopt;
  abi::TensorInfo* info = nullptr;
  if (abi::Status* status = api.ShapeInput(context, index, &info)) {
    api.ReleaseStatus(status);
    return std::nullopt;
  }
  if (!info) return std::nullopt;
  SymbolicShape shape;
  size_t rank = 0;
  abi::Check(api.GetRank(info, &rank));
  // ONNX Runtime shows an input of unknown rank as one of rank 0, which no input of ours may have... an index
  // may.
  shape.dims.resize(rank);
  shape.symbols.assign(rank, "");
  if (rank > 0) {
    abi::Check(api.GetDims(info, shape.dims.data(), rank));
    abi::Check(api.GetSymbols(info, shape.symbols.data(), rank));
  }
  return shape;
}

void WriteOutputShape(const abi::Api& api, abi::ShapeContext* context, const SymbolicShape& shape) {
  struct Owner {
    const abi::Api& api;
    abi::TensorInfo* info = nullptr;
    ~Owner() {
      if (info) api.ReleaseInfo(info);
    }
  } owner{api};
  abi::Check(api.CreateInfo(&owner.info));
  abi::Check(api.SetType(owner.info, abi::ElementType::kFloat));
  abi::Check(api.SetDims(owner.info, shape.dims.data(), shape.dims.size()));
  // ONNX Runtime takes an unknown dimension without a name for the number -1, so each gets a name of its own.
  static std::atomic<uint64_t> unknown_dims{0};
  std::vector<std::string> names(shape.dims.size());
  std::vector<const char*> symbols = shape.symbols;
  for (size_t i = 0; i < symbols.size(); ++i) {
    if (shape.dims[i] >= 0 || *symbols[i]) continue;
    names[i] = "onnxq_unknown_" + std::to_string(unknown_dims++);
    symbols[i] = names[i].c_str();
  }
  abi::Check(api.SetSymbols(owner.info, symbols.data(), symbols.size()));
  abi::Check(api.ShapeOutput(context, 0, owner.info));
}

int64_t ReadIntAttribute(const abi::Api& api, const abi::ShapeContext* context, const char* name) {
  const abi::OpAttribute* attribute = nullptr;
  int64_t value = -1;
  size_t used = 0;
  abi::Status* status = api.ShapeAttribute(context, name, &attribute);
  if (!status && attribute)
    status = api.ReadAttribute(attribute, abi::AttributeType::kInt, &value, sizeof value, &used);
  if (!status) return attribute ? value : -1;
  api.ReleaseStatus(status);
  return -1;
}

}  // namespace onnxq::ops
