// A frame's analysis and synthesis over any number of rows.
//
// Both are one Kronecker product: a Walsh-Hadamard transform of length left * middle, a Hartley transform of
// length odd, and the block. The Walsh-Hadamard transform splits anywhere, so its last stages, the Hartley
// transform and, where its width allows, the block become one small dense matrix: whole vectors of a product
// instead of stages with runs shorter than a vector. A Frame picks the split that costs least.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/matmul.h"
#include "kernels/problem.h"

namespace onnxq::kernels {

/// left and middle are powers of two, odd is odd, narrow <= wide, narrow divides middle * odd.
struct FrameShape {
  int64_t left, middle, odd;
  int64_t narrow, wide;  ///< the block: [narrow, wide]

  int64_t Length() const { return left * middle * odd; }
  int64_t WideLength() const { return Length() / narrow * wide; }
};

enum class FrameDirection { kAnalysis, kSynthesis };

/// A dense matrix whose rows are padded with zeros to whole vectors.
struct FrameMatrix {
  int64_t depth = 0, outputs = 0, stride = 0;
  std::vector<float> values;  ///< [depth, stride]
};

/// Everything about one direction of a frame that does not depend on x or the signs.
class Frame {
 public:
  /// block: [narrow, wide]; lanes: floats of one vector of the kernels that will run.
  Frame(const FrameShape& shape, FrameDirection direction, const float* block, int lanes);

  int64_t inputs() const { return analysis() ? shape_.Length() : shape_.WideLength(); }
  int64_t outputs() const { return analysis() ? shape_.WideLength() : shape_.Length(); }
  int64_t scratch_floats() const { return padded_floats() + (merged_ ? 0 : shape_.Length()); }
  /// Multiply-adds of one row, roughly.
  int64_t work() const;

  /// One row; scratch holds scratch_floats(), aligned to a vector.
  void Run(const KernelTable& kernels, const float* signs, const float* x, float* y, float* scratch) const;

 private:
  bool analysis() const { return direction_ == FrameDirection::kAnalysis; }
  int64_t padded_floats() const { return (rows_ * padded_ + 15) / 16 * 16; }
  void ChooseSplit(int lanes);
  void Multiply(const KernelTable& kernels, const FrameMatrix& matrix, int64_t rows, const float* x,
                int64_t x_stride, float* y, int64_t y_stride) const;
  void Mix(const KernelTable& kernels, const float* x, int64_t x_stride, float* y, int64_t y_stride) const;

  FrameShape shape_;
  FrameDirection direction_;
  int64_t rows_ = 1;         ///< of the Walsh-Hadamard transform by stages
  int64_t width_ = 1;        ///< of the dense rest: rows_ * width_ = d
  int64_t padded_ = 1;       ///< width_ in whole vectors
  bool merged_ = false;      ///< the block is part of mixing_
  FrameMatrix mixing_;       ///< [width_, width_], or with the block in it
  FrameMatrix block_;        ///< unless merged
  std::vector<float> wave_;  ///< one period of the Hartley transform where its matrix would be too large
};

/// signs as +1 and -1: bit i % 8 of byte i / 8 is 1 where value i is negated.
std::vector<float> UnpackSigns(const uint8_t* bits, int64_t count);

/// x: [rows, inputs], y: [rows, outputs]. False when scratch memory or the pool is refused.
bool TransformFrames(const KernelTable& kernels, const Frame& frame, const float* signs, const float* x,
                     int64_t rows, float* y, const Parallel& parallel);

}  // namespace onnxq::kernels
