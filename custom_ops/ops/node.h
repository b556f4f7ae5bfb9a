// What ops read of their node, and how their messages name it.
#pragma once

#include <string>
#include <vector>

#include "abi/ort_abi.h"
#include "abi/result.h"

namespace onnxq::ops {

/// "onnxq: LowBitMatMul node 'encoder/fc1'": how every message of this node begins.
std::string NodeTitle(const abi::Api& api, const abi::KernelInfo* info, const char* op);
/// "input 1 (packed)"
std::string InputTitle(size_t index, const char* name);

std::string ShapeText(const std::vector<int64_t>& dims);
const char* TypeName(abi::ElementType type);
[[noreturn]] void Refuse(const std::string& title, const std::string& what);

/// How the message ends where a tensor is not what onnxq writes.
constexpr const char* kDamaged = "; the file is damaged or was edited: quantize the model again";

int64_t IntAttribute(const abi::Api& api, const abi::KernelInfo* info, const std::string& title,
                     const char* name);
int64_t IntAttribute(const abi::Api& api, const abi::KernelInfo* info, const char* name, int64_t missing);

std::vector<int64_t> IntsAttribute(const abi::Api& api, const abi::KernelInfo* info, const std::string& title,
                                   const char* name);

/// Refuses a layout version that this library does not know.
void CheckLayoutVersion(const abi::Api& api, const abi::KernelInfo* info, const std::string& title);

/// What all ops over weights have: N (at most 2**31), K, gain, and a layout version that this library
/// knows.
struct WeightAttributes {
  int64_t outputs;
  int64_t depth;
  float gain;
};
constexpr int kMostDepthBits = 27;
WeightAttributes ReadWeightAttributes(const abi::Api& api, const abi::KernelInfo* info,
                                      const std::string& title, int most_depth_bits = kMostDepthBits);

/// Null unless the input is a constant.
const abi::Value* ConstantInput(const abi::Api& api, const abi::KernelInfo* info, size_t index);
const abi::Value* RequiredInput(const abi::Api& api, const abi::KernelContext* context,
                                const std::string& title, size_t index, const char* name);

}  // namespace onnxq::ops
