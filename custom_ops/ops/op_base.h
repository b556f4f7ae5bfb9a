// What every op of this library answers alike, so that an op's file holds only what is its own.
#pragma once

#include <climits>
#include <optional>
#include <string>
#include <vector>

#include "abi/ort_abi.h"
#include "abi/result.h"
#include "kernels/matmul.h"

namespace onnxq::ops {

/// ONNX Runtime's function table; set once, before any op can be asked anything.
inline abi::FunctionTable g_function_table = nullptr;
inline abi::Api TheApi() { return abi::Api(g_function_table); }

/// Fills a CustomOp from a class with kName, kInputs, kOutputs (element types), a constructor (Api,
/// KernelInfo) and Compute(KernelContext*), plus a static InferShape.
template <class Kernel>
abi::CustomOp MakeOp() {
  abi::CustomOp op{};
  op.version = abi::kCustomOpVersion;
  op.name = [](const abi::CustomOp*) { return Kernel::kName; };
  op.execution_provider = [](const abi::CustomOp*) -> const char* { return nullptr; };  // the CPU
  op.input_type = [](const abi::CustomOp*, size_t i) { return Kernel::kInputs[i]; };
  op.input_count = [](const abi::CustomOp*) { return std::size(Kernel::kInputs); };
  op.output_type = [](const abi::CustomOp*, size_t) { return abi::ElementType::kFloat; };
  op.output_count = [](const abi::CustomOp*) { return size_t{1}; };
  op.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.input_characteristic = [](const abi::CustomOp*, size_t) { return abi::Characteristic::kRequired; };
  op.output_characteristic = [](const abi::CustomOp*, size_t) { return abi::Characteristic::kRequired; };
  op.input_memory = [](const abi::CustomOp*, size_t) { return abi::MemoryType::kDefault; };
  op.variadic_input_min = op.variadic_output_min = [](const abi::CustomOp*) { return 1; };
  op.variadic_input_homogeneous = op.variadic_output_homogeneous = [](const abi::CustomOp*) { return 1; };
  op.create_kernel_v2 = [](const abi::CustomOp*, abi::FunctionTable table, const abi::KernelInfo* info,
                           void** out) {
    *out = nullptr;
    const abi::Api api(table);
    return abi::Guard(api, [&] { *out = new Kernel(api, info); });
  };
  op.compute_v2 = [](void* kernel, abi::KernelContext* context) {
    Kernel& k = *static_cast<Kernel*>(kernel);
    return abi::Guard(k.api(), [&] { k.Compute(context); });
  };
  op.infer_shape = [](const abi::CustomOp*, abi::ShapeContext* context) {
    const abi::Api api = TheApi();
    return abi::Guard(api, [&] { Kernel::InferShape(api, context); });
  };
  op.start_version = [](const abi::CustomOp*) { return 1; };
  op.end_version = [](const abi::CustomOp*) { return INT_MAX; };
  return op;
}

/// Dimensions during shape inference; a symbol stands where the value is -1 and a name is known.
struct SymbolicShape {
  std::vector<int64_t> dims;
  std::vector<const char*> symbols;
};

/// Nothing when the shape of the input is not known.
std::optional<SymbolicShape> ReadInputShape(const abi::Api& api, const abi::ShapeContext* context,
                                            size_t index);
void WriteOutputShape(const abi::Api& api, abi::ShapeContext* context, const SymbolicShape& shape);
/// -1 when the attribute is missing or no integer.
int64_t ReadIntAttribute(const abi::Api& api, const abi::ShapeContext* context, const char* name);

/// ONNX Runtime's own thread pool behind the kernels' interface.
struct SessionPool {
  abi::Api api;
  const abi::KernelContext* context;
  abi::Status* status = nullptr;  ///< why the pool refused

  kernels::Parallel Interface() {
    return {[](void* pool, kernels::Parallel::Task task, size_t count, void* argument) {
              SessionPool& self = *static_cast<SessionPool*>(pool);
              self.status = self.api.ParallelFor(self.context, task, count, 0, argument);
              return self.status == nullptr;
            },
            this};
  }
};

}  // namespace onnxq::ops
