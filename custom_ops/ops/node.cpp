#include "ops/node.h"

#include <cmath>

namespace onnxq::ops {
namespace {

constexpr int64_t kLayoutVersion = 1;
// With the bound on K, keeps every product of dimensions far inside int64; no real weight comes near.
constexpr int64_t kMaxOutputs = int64_t{1} << 31;

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

std::string InputTitle(size_t index, const char* name) {
  return "input " + std::to_string(index) + " (" + name + ")";
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

std::vector<int64_t> IntsAttribute(const abi::Api& api, const abi::KernelInfo* info, const std::string& title,
                                   const char* name) {
  size_t count = 0;
  std::vector<int64_t> values;
  bool found = Found(api, api.AttributeInts(info, name, nullptr, &count));
  if (found && count > 0) {
    values.resize(count);
    found = Found(api, api.AttributeInts(info, name, values.data(), &count));
  }
  if (!found)
    Refuse(title, std::string("the attribute '") + name +
                      "', a list of integers, is missing; write the model again with onnxq");
  return values;
}

void CheckLayoutVersion(const abi::Api& api, const abi::KernelInfo* info, const std::string& title) {
  const int64_t version = IntAttribute(api, info, "layout_version", kLayoutVersion);
  if (version != kLayoutVersion)
    Refuse(title, "layout_version is " + std::to_string(version) +
                      ", but this library reads version 1; update onnxq, or quantize the model again");
}

WeightAttributes ReadWeightAttributes(const abi::Api& api, const abi::KernelInfo* info,
                                      const std::string& title, int most_depth_bits) {
  CheckLayoutVersion(api, info, title);
  const int64_t depth = IntAttribute(api, info, title, "K");
  const int64_t outputs = IntAttribute(api, info, title, "N");
  if (depth < 1 || depth > int64_t{1} << most_depth_bits || outputs < 1 || outputs > kMaxOutputs)
    Refuse(title, "attributes N = " + std::to_string(outputs) + " and K = " + std::to_string(depth) +
                      " must be at least 1 and at most 2**31 and 2**" + std::to_string(most_depth_bits));
  float gain = 1.0f;
  if (!Found(api, api.AttributeFloat(info, "gain", &gain))) gain = 1.0f;
  if (!std::isfinite(gain)) Refuse(title, "attribute gain is not a finite number");
  return {outputs, depth, gain};
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
    case abi::ElementType::kUint16:
      return "uint16";
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

const abi::Value* ConstantInput(const abi::Api& api, const abi::KernelInfo* info, size_t index) {
  int is_constant = 0;
  const abi::Value* value = nullptr;
  if (!Found(api, api.ConstantInput(info, index, &is_constant, &value))) return nullptr;
  return is_constant ? value : nullptr;
}

const abi::Value* RequiredInput(const abi::Api& api, const abi::KernelContext* context,
                                const std::string& title, size_t index, const char* name) {
  const abi::Value* value = nullptr;
  abi::Check(api.Input(context, index, &value));
  if (!value) Refuse(title, InputTitle(index, name) + " is missing");
  return value;
}

}  // namespace onnxq::ops
