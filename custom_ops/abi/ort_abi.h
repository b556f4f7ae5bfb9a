// The few entries of ONNX Runtime's C interface that this library calls, declared here because ONNX Runtime's
// wheels carry no headers. The function table only ever grows at its end, so a slot never moves.
#pragma once

#include <cstddef>
#include <cstdint>

namespace onnxq::abi {

// Opaque things of ONNX Runtime.
struct Status;
struct Value;
struct TensorInfo;
struct KernelInfo;
struct KernelContext;
struct ShapeContext;
struct OpAttribute;
struct SessionOptions;
struct CustomOpDomain;

/// The lowest version of the function table that holds every slot below (KernelContext_ParallelFor is the
/// newest); ONNX Runtime 1.17 and later give it out.
constexpr uint32_t kApiVersion = 17;
/// The custom-op structure below up to GetEndVersion.
constexpr uint32_t kCustomOpVersion = 17;

enum class ErrorCode : int { kFail = 1, kInvalidArgument = 2, kInvalidGraph = 10 };

enum class ElementType : int {
  kUndefined = 0,
  kFloat = 1,
  kUint8 = 2,
  kUint16 = 4,
  kInt32 = 6,
  kInt64 = 7,
  kFloat16 = 10,
};

enum class Characteristic : int { kRequired = 0, kOptional = 1, kVariadic = 2 };
enum class MemoryType : int { kDefault = 0 };
enum class AttributeType : int { kInt = 1 };

using FunctionTable = const void* const*;

struct ApiBase {
  FunctionTable (*get_api)(uint32_t version);
  const char* (*get_version)();
};

struct CustomOp {
  uint32_t version;
  void* (*create_kernel)(const CustomOp*, FunctionTable, const KernelInfo*);
  const char* (*name)(const CustomOp*);
  const char* (*execution_provider)(const CustomOp*);
  ElementType (*input_type)(const CustomOp*, size_t index);
  size_t (*input_count)(const CustomOp*);
  ElementType (*output_type)(const CustomOp*, size_t index);
  size_t (*output_count)(const CustomOp*);
  void (*compute)(void* kernel, KernelContext*);
  void (*destroy)(void* kernel);
  Characteristic (*input_characteristic)(const CustomOp*, size_t index);
  Characteristic (*output_characteristic)(const CustomOp*, size_t index);
  MemoryType (*input_memory)(const CustomOp*, size_t index);
  int (*variadic_input_min)(const CustomOp*);
  int (*variadic_input_homogeneous)(const CustomOp*);
  int (*variadic_output_min)(const CustomOp*);
  int (*variadic_output_homogeneous)(const CustomOp*);
  Status* (*create_kernel_v2)(const CustomOp*, FunctionTable, const KernelInfo*, void** kernel);
  Status* (*compute_v2)(void* kernel, KernelContext*);
  Status* (*infer_shape)(const CustomOp*, ShapeContext*);
  int (*start_version)(const CustomOp*);
  int (*end_version)(const CustomOp*);
};

static_assert(sizeof(void*) == 8);
static_assert(offsetof(CustomOp, create_kernel) == 8 && offsetof(CustomOp, name) == 16);
static_assert(offsetof(CustomOp, execution_provider) == 24 && offsetof(CustomOp, input_type) == 32);
static_assert(offsetof(CustomOp, input_count) == 40 && offsetof(CustomOp, output_type) == 48);
static_assert(offsetof(CustomOp, output_count) == 56 && offsetof(CustomOp, compute) == 64);
static_assert(offsetof(CustomOp, destroy) == 72 && offsetof(CustomOp, input_characteristic) == 80);
static_assert(offsetof(CustomOp, output_characteristic) == 88 && offsetof(CustomOp, input_memory) == 96);
static_assert(offsetof(CustomOp, variadic_input_min) == 104);
static_assert(offsetof(CustomOp, variadic_input_homogeneous) == 112);
static_assert(offsetof(CustomOp, variadic_output_min) == 120);
static_assert(offsetof(CustomOp, variadic_output_homogeneous) == 128);
static_assert(offsetof(CustomOp, create_kernel_v2) == 136 && offsetof(CustomOp, compute_v2) == 144);
static_assert(offsetof(CustomOp, infer_shape) == 152 && offsetof(CustomOp, start_version) == 160);
static_assert(offsetof(CustomOp, end_version) == 168);

/// Typed calls into the function table; each names its slot once.
class Api {
 public:
  explicit Api(FunctionTable table) : table_(table) {}

  Status* CreateStatus(ErrorCode code, const char* text) const { return Call<0, Status*>(int(code), text); }
  void ReleaseStatus(Status* s) const { Call<93, void>(s); }
  Status* CreateDomain(const char* name, CustomOpDomain** out) const { return Call<26, Status*>(name, out); }
  Status* DomainAdd(CustomOpDomain* d, const CustomOp* op) const { return Call<27, Status*>(d, op); }
  Status* AddDomain(SessionOptions* o, CustomOpDomain* d) const { return Call<28, Status*>(o, d); }

  Status* TensorData(const Value* v, void** out) const { return Call<51, Status*>(v, out); }
  Status* TensorTypeAndShape(const Value* v, TensorInfo** out) const { return Call<65, Status*>(v, out); }
  Status* CreateInfo(TensorInfo** out) const { return Call<57, Status*>(out); }
  void ReleaseInfo(TensorInfo* i) const { Call<99, void>(i); }
  Status* SetType(TensorInfo* i, ElementType t) const { return Call<58, Status*>(i, int(t)); }
  Status* SetDims(TensorInfo* i, const int64_t* d, size_t n) const { return Call<59, Status*>(i, d, n); }
  Status* SetSymbols(TensorInfo* i, const char** s, size_t n) const { return Call<271, Status*>(i, s, n); }
  Status* GetType(const TensorInfo* i, int* out) const { return Call<60, Status*>(i, out); }
  Status* GetRank(const TensorInfo* i, size_t* out) const { return Call<61, Status*>(i, out); }
  Status* GetDims(const TensorInfo* i, int64_t* d, size_t n) const { return Call<62, Status*>(i, d, n); }
  Status* GetSymbols(const TensorInfo* i, const char** s, size_t n) const {
    return Call<63, Status*>(i, s, n);
  }

  Status* AttributeFloat(const KernelInfo* i, const char* n, float* out) const {
    return Call<85, Status*>(i, n, out);
  }
  Status* AttributeInt(const KernelInfo* i, const char* n, int64_t* out) const {
    return Call<86, Status*>(i, n, out);
  }
  /// Too few values in `size` are an error, and `size` then tells how many there are; so does a null `out`.
  Status* AttributeInts(const KernelInfo* i, const char* n, int64_t* out, size_t* size) const {
    return Call<163, Status*>(i, n, out, size);
  }
  Status* NodeName(const KernelInfo* i, char* out, size_t* size) const {
    return Call<244, Status*>(i, out, size);
  }
  Status* ConstantInput(const KernelInfo* i, size_t index, int* is_constant, const Value** out) const {
    return Call<249, Status*>(i, index, is_constant, out);
  }

  Status* Input(const KernelContext* c, size_t index, const Value** out) const {
    return Call<90, Status*>(c, index, out);
  }
  Status* Output(KernelContext* c, size_t index, const int64_t* dims, size_t rank, Value** out) const {
    return Call<91, Status*>(c, index, dims, rank, out);
  }
  Status* ParallelFor(const KernelContext* c, void (*task)(void*, size_t), size_t total, size_t batches,
                      void* argument) const {
    return Call<274, Status*>(c, task, total, batches, argument);
  }

  Status* ShapeInputCount(const ShapeContext* c, size_t* out) const { return Call<267, Status*>(c, out); }
  /// The information stays ONNX Runtime's.
  Status* ShapeInput(const ShapeContext* c, size_t index, TensorInfo** out) const {
    return Call<268, Status*>(c, index, out);
  }
  Status* ShapeAttribute(const ShapeContext* c, const char* name, const OpAttribute** out) const {
    return Call<269, Status*>(c, name, out);
  }
  Status* ShapeOutput(const ShapeContext* c, size_t index, const TensorInfo* i) const {
    return Call<270, Status*>(c, index, i);
  }
  Status* ReadAttribute(const OpAttribute* a, AttributeType type, void* data, size_t bytes,
                        size_t* used) const {
    return Call<272, Status*>(a, int(type), data, bytes, used);
  }

 private:
  template <size_t kSlot, class Result, class... Arguments>
  Result Call(Arguments... arguments) const {
    using Function = Result (*)(Arguments...);
    return reinterpret_cast<Function>(const_cast<void*>(table_[kSlot]))(arguments...);
  }

  FunctionTable table_;
};

}  // namespace onnxq::abi
