// Errors inside the library are C++ exceptions of one type; Guard turns them into ONNX Runtime statuses, so
// that none crosses the C interface.
#pragma once

#include <exception>
#include <new>
#include <string>
#include <vector>

#include "abi/ort_abi.h"

namespace onnxq::abi {

struct Error {
  ErrorCode code;
  std::string message;
};

/// A call into ONNX Runtime that failed: its own status goes back unchanged.
struct Failed {
  Status* status;
};

inline void Check(Status* status) {
  if (status) throw Failed{status};
}

/// Runs f and returns null, or the status for whatever it threw.
template <class F>
Status* Guard(const Api& api, const F& f) noexcept {
  try {
    f();
    return nullptr;
  } catch (const Failed& e) {
    return e.status;
  } catch (const Error& e) {
    return api.CreateStatus(e.code, e.message.c_str());
  } catch (const std::bad_alloc&) {
    return api.CreateStatus(ErrorCode::kFail, "onnxq: out of memory");
  } catch (const std::exception& e) {
    return api.CreateStatus(ErrorCode::kFail, e.what());
  } catch (...) {
    return api.CreateStatus(ErrorCode::kFail, "onnxq: unexpected error");
  }
}

/// Element type and dimensions of a tensor.
struct Shape {
  ElementType type = ElementType::kUndefined;
  std::vector<int64_t> dims;
};

inline Shape ReadShape(const Api& api, const TensorInfo* info) {
  Shape shape;
  int type = 0;
  size_t rank = 0;
  Check(api.GetType(info, &type));
  Check(api.GetRank(info, &rank));
  shape.type = ElementType(type);
  shape.dims.resize(rank);
  if (rank > 0) Check(api.GetDims(info, shape.dims.data(), rank));
  return shape;
}

inline Shape ReadShape(const Api& api, const Value* value) {
  struct Owner {
    const Api& api;
    TensorInfo* info = nullptr;
    ~Owner() {
      if (info) api.ReleaseInfo(info);
    }
  } owner{api};
  Check(api.TensorTypeAndShape(value, &owner.info));
  return ReadShape(api, owner.info);
}

template <class T>
const T* Data(const Api& api, const Value* value) {
  void* data = nullptr;
  Check(api.TensorData(value, &data));
  return static_cast<const T*>(data);
}

}  // namespace onnxq::abi
