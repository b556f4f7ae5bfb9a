#pragma once

#include <cstddef>
#include <new>

namespace onnxq::kernels {

/// Memory of one thread that is kept between calls, because asking for it costs more than a small product.
class Scratch {
 public:
  ~Scratch() { ::operator delete[](memory_, std::align_val_t{kAlignment}); }
  /// Null when there is no memory.
  char* Get(size_t bytes) {
    if (bytes > capacity_) {
      ::operator delete[](memory_, std::align_val_t{kAlignment});
      memory_ = static_cast<char*>(::operator new[](bytes, std::align_val_t{kAlignment}, std::nothrow));
      capacity_ = memory_ ? bytes : 0;
    }
    return memory_;
  }
  /// Gives back what was asked for once and is too much to keep.
  void KeepAtMost(size_t bytes) {
    if (capacity_ <= bytes) return;
    ::operator delete[](memory_, std::align_val_t{kAlignment});
    memory_ = nullptr;
    capacity_ = 0;
  }

 private:
  static constexpr size_t kAlignment = 64;
  char* memory_ = nullptr;
  size_t capacity_ = 0;
};

}  // namespace onnxq::kernels
