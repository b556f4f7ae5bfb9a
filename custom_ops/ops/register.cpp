// The three symbols that the library shows.

#include <string>

#include "abi/ort_abi.h"
#include "abi/result.h"
#include "kernels/compiler.h"
#include "kernels/dispatch.h"
#include "ops/binary_code_matmul.h"
#include "ops/codebook_matmul.h"
#include "ops/float8_gather.h"
#include "ops/float8_matmul.h"
#include "ops/float8_round.h"
#include "ops/frame_transform.h"
#include "ops/low_bit_gather.h"
#include "ops/low_bit_matmul.h"
#include "ops/mixed_bit_gather.h"
#include "ops/mixed_bit_matmul.h"
#include "ops/op_base.h"

namespace {

using onnxq::abi::Api;

/// One domain for the whole process. Never released: sessions refer to it until the process ends.
onnxq::abi::CustomOpDomain* TheDomain(const Api& api) {
  static onnxq::abi::CustomOpDomain* domain = [&] {
    onnxq::abi::CustomOpDomain* made = nullptr;
    onnxq::abi::Check(api.CreateDomain("onnxq", &made));
    onnxq::abi::Check(api.DomainAdd(made, &onnxq::ops::LowBitMatMulOp()));
    onnxq::abi::Check(api.DomainAdd(made, &onnxq::ops::LowBitGatherOp()));
    onnxq::abi::Check(api.DomainAdd(made, &onnxq::ops::CodebookMatMulOp()));
    onnxq::abi::Check(api.DomainAdd(made, &onnxq::ops::MixedBitMatMulOp()));
    onnxq::abi::Check(api.DomainAdd(made, &onnxq::ops::Float8MatMulOp()));
    onnxq::abi::Check(api.DomainAdd(made, &onnxq::ops::Float8GatherOp()));
    onnxq::abi::Check(api.DomainAdd(made, &onnxq::ops::Float8RoundOp()));
    onnxq::abi::Check(api.DomainAdd(made, &onnxq::ops::Float8RoundTokensOp()));
    onnxq::abi::Check(api.DomainAdd(made, &onnxq::ops::BinaryCodeMatMulOp()));
    onnxq::abi::Check(api.DomainAdd(made, &onnxq::ops::MixedBitGatherOp()));
    onnxq::abi::Check(api.DomainAdd(made, &onnxq::ops::FrameAnalysisOp()));
    onnxq::abi::Check(api.DomainAdd(made, &onnxq::ops::FrameSynthesisOp()));
    return made;
  }();
  return domain;
}

}  // namespace

extern "C" {

/// What ONNX Runtime calls when a session registers this library.
ONNXQ_EXPORT onnxq::abi::Status* RegisterCustomOps(onnxq::abi::SessionOptions* options,
                                                   const onnxq::abi::ApiBase* base) {
  using namespace onnxq;
  const abi::FunctionTable table = base->get_api(abi::kApiVersion);
  if (!table) {
    // The slots of errors are in every version of the table.
    const abi::FunctionTable first = base->get_api(1);
    if (!first) return nullptr;
    const std::string text =
        std::string("onnxq needs ONNX Runtime 1.17 or later, found ") + base->get_version();
    return Api(first).CreateStatus(abi::ErrorCode::kFail, text.c_str());
  }
  ops::g_function_table = table;
  const Api api(table);
  return abi::Guard(api, [&] { abi::Check(api.AddDomain(options, TheDomain(api))); });
}

/// JSON text about version, instruction sets and the choice made; lives as long as the library.
ONNXQ_EXPORT const char* OnnxqDescribe() {
  try {
    return onnxq::kernels::Describe();
  } catch (...) {
    return "{}";
  }
}

}  // extern "C"
