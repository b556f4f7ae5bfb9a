#include "kernels/frame.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <limits>

#include "kernels/scratch.h"

namespace onnxq::kernels {
namespace {

constexpr double kTurn = 6.283185307179586476925;
// Building a dense rest with the block in it takes its width squared times the block's.
constexpr int64_t kWidestRest = 128;
// Above this the Hartley matrix would take more than 16 MiB; its one period then serves every row.
constexpr int64_t kLargestHartley = 2048;
// A stage of the Walsh-Hadamard transform loads, adds and stores: against one multiply-add of a product.
constexpr double kStageCost = 1.5;
// Multiply-adds of one task: some microseconds, below which a pool costs more than it saves.
constexpr int64_t kTaskWork = 1 << 18;
constexpr int64_t kMostTasks = 64;
constexpr size_t kKeptBytes = size_t{4} << 20;

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }

/// One period of the Hartley transform of length `odd`, times `factor`.
std::vector<double> Wave(int64_t odd, double factor) {
  std::vector<double> wave(static_cast<size_t>(odd));
  for (int64_t i = 0; i < odd; ++i) {
    const double angle = kTurn * double(i) / double(odd);
    wave[size_t(i)] = (std::cos(angle) + std::sin(angle)) * factor;
  }
  return wave;
}

FrameMatrix NewMatrix(int64_t depth, int64_t outputs, int lanes) {
  FrameMatrix matrix{depth, outputs, RoundUp(outputs, lanes), {}};
  matrix.values.resize(size_t(depth * matrix.stride));
  return matrix;
}

/// The block or, for synthesis, its transpose.
FrameMatrix BlockMatrix(const FrameShape& s, bool analysis, const float* block, int lanes) {
  FrameMatrix matrix = NewMatrix(analysis ? s.narrow : s.wide, analysis ? s.wide : s.narrow, lanes);
  for (int64_t i = 0; i < s.narrow; ++i)
    for (int64_t j = 0; j < s.wide; ++j)
      matrix.values[size_t(analysis ? i * matrix.stride + j : j * matrix.stride + i)] = block[i * s.wide + j];
  return matrix;
}

/// The Walsh-Hadamard matrix of length width / odd (x) the Hartley matrix, times `factor`.
FrameMatrix MixingMatrix(int64_t width, int64_t odd, double factor, int lanes) {
  const std::vector<double> wave = Wave(odd, factor);
  FrameMatrix matrix = NewMatrix(width, width, lanes);
  for (int64_t i = 0; i < width; ++i) {
    for (int64_t j = 0; j < width; ++j) {
      const double value = wave[size_t(i % odd * (j % odd) % odd)];
      const bool negative = std::popcount(uint64_t(i / odd & j / odd)) % 2 != 0;
      matrix.values[size_t(i * matrix.stride + j)] = float(negative ? -value : value);
    }
  }
  return matrix;
}

/// Mixing and then the block, or the transpose of that.
FrameMatrix MergedMatrix(const FrameShape& s, int64_t width, double factor, bool analysis, const float* block,
                         int lanes) {
  const int64_t wide = width / s.narrow * s.wide;
  const std::vector<double> wave = Wave(s.odd, factor);
  FrameMatrix matrix = NewMatrix(analysis ? width : wide, analysis ? wide : width, lanes);
  std::vector<double> row(static_cast<size_t>(wide));
  for (int64_t i = 0; i < width; ++i) {
    std::fill(row.begin(), row.end(), 0.0);
    for (int64_t j = 0; j < width; ++j) {
      const double value = wave[size_t(i % s.odd * (j % s.odd) % s.odd)];
      const bool negative = std::popcount(uint64_t(i / s.odd & j / s.odd)) % 2 != 0;
      const float* block_row = block + j % s.narrow * s.wide;
      double* to = row.data() + j / s.narrow * s.wide;
      for (int64_t k = 0; k < s.wide; ++k) to[k] += (negative ? -value : value) * block_row[k];
    }
    for (int64_t k = 0; k < wide; ++k)
      matrix.values[size_t(analysis ? i * matrix.stride + k : k * matrix.stride + i)] = float(row[size_t(k)]);
  }
  return matrix;
}

struct Call {
  const KernelTable& kernels;
  const Frame& frame;
  const float* signs;
  const float* x;
  float* y;
  int64_t rows;
  int64_t step;  // rows of one task
  std::atomic<bool> refused{false};
};

void RunTask(void* argument, size_t index) {
  Call& c = *static_cast<Call*>(argument);
  thread_local Scratch scratch;
  float* memory = reinterpret_cast<float*>(scratch.Get(size_t(c.frame.scratch_floats()) * sizeof(float)));
  if (!memory) {
    c.refused = true;
    return;
  }
  const int64_t begin = int64_t(index) * c.step;
  for (int64_t row = begin; row < std::min(begin + c.step, c.rows); ++row)
    c.frame.Run(c.kernels, c.signs, c.x + row * c.frame.inputs(), c.y + row * c.frame.outputs(), memory);
  scratch.KeepAtMost(kKeptBytes);
}

}  // namespace

Frame::Frame(const FrameShape& shape, FrameDirection direction, const float* block, int lanes)
    : shape_(shape), direction_(direction) {
  ChooseSplit(lanes);
  const double factor = 1.0 / std::sqrt(double(shape.Length()));
  const bool single = shape.wide == 1;
  if (!merged_) block_ = BlockMatrix(shape, analysis(), block, lanes);
  if (width_ > kLargestHartley) {
    const std::vector<double> wave = Wave(shape.odd, single ? factor * block[0] : factor);
    wave_.assign(wave.begin(), wave.end());
  } else if (merged_ && !single) {
    mixing_ = MergedMatrix(shape, width_, factor, analysis(), block, lanes);
  } else {
    mixing_ = MixingMatrix(width_, shape.odd, single ? factor * block[0] : factor, lanes);
  }
}

void Frame::ChooseSplit(int lanes) {
  const int64_t length = shape_.left * shape_.middle;
  const auto vectors = [&](int64_t floats) { return double(CeilDiv(floats, lanes)); };
  double best = std::numeric_limits<double>::infinity();
  for (int64_t rest = 1; rest <= length; rest *= 2) {
    const int64_t width = rest * shape_.odd;
    if (rest > 1 && width > kWidestRest) break;
    const double rows = double(length / rest);
    const double stages = rows * vectors(width) * std::log2(rows) * kStageCost;
    const auto product = [&](int64_t depth, int64_t outputs) {
      return analysis() ? double(depth) * vectors(outputs) : double(outputs) * vectors(depth);
    };
    const bool single = shape_.wide == 1;
    const double mixing = rows * double(width) * vectors(width);
    const double blocks = double(shape_.Length() / shape_.narrow) * product(shape_.narrow, shape_.wide);
    const bool mergeable = single || (width <= kWidestRest && width % shape_.narrow == 0);
    const double together = rows * product(width, width / shape_.narrow * shape_.wide);
    const bool merged = mergeable && together <= mixing + blocks;
    const double cost = stages + (merged || single ? together : mixing + blocks);
    if (cost >= best) continue;
    best = cost;
    rows_ = length / rest;
    width_ = width;
    merged_ = merged || single;
  }
  padded_ = RoundUp(width_, lanes);
}

int64_t Frame::work() const {
  const int64_t product = merged_ ? width_ * shape_.WideLength() / shape_.Length() : width_ + shape_.wide;
  return shape_.Length() * (std::bit_width(uint64_t(rows_)) + product);
}

void Frame::Multiply(const KernelTable& kernels, const FrameMatrix& matrix, int64_t rows, const float* x,
                     int64_t x_stride, float* y, int64_t y_stride) const {
  // Into rows of whole vectors the zeros beyond the matrix's columns go along: no ragged end.
  const int64_t outputs = y_stride >= matrix.stride ? matrix.stride : matrix.outputs;
  kernels.multiply_frame({.x = x,
                          .x_stride = x_stride,
                          .matrix = matrix.values.data(),
                          .matrix_stride = matrix.stride,
                          .y = y,
                          .y_stride = y_stride,
                          .y_size = (rows - 1) * y_stride + outputs,
                          .rows = rows,
                          .depth = matrix.depth,
                          .outputs = outputs});
}

void Frame::Mix(const KernelTable& kernels, const float* x, int64_t x_stride, float* y,
                int64_t y_stride) const {
  if (wave_.empty()) return Multiply(kernels, mixing_, rows_, x, x_stride, y, y_stride);
  for (int64_t row = 0; row < rows_; ++row, x += x_stride, y += y_stride) {
    for (int64_t i = 0; i < width_; ++i) {
      double sum = 0.0;
      int64_t phase = 0;
      for (int64_t j = 0; j < width_; ++j) {
        sum += double(x[j]) * wave_[size_t(phase)];
        phase += i;
        if (phase >= width_) phase -= width_;
      }
      y[i] = float(sum);
    }
    std::fill(y + width_, y + std::max(width_, y_stride), 0.0f);
  }
}

void Frame::Run(const KernelTable& kernels, const float* signs, const float* x, float* y,
                float* scratch) const {
  const int64_t length = shape_.Length();
  const int64_t merged_wide = merged_ ? width_ / shape_.narrow * shape_.wide : width_;
  float* mixed = scratch;
  float* plain = scratch + padded_floats();
  if (analysis()) {
    kernels.copy_signed({x, width_, signs, mixed, padded_, rows_, width_});
    kernels.walsh_hadamard(mixed, rows_, padded_);
    Mix(kernels, mixed, padded_, merged_ ? y : plain, merged_wide);
    if (!merged_) Multiply(kernels, block_, length / shape_.narrow, plain, shape_.narrow, y, shape_.wide);
  } else {
    if (!merged_) Multiply(kernels, block_, length / shape_.narrow, x, shape_.wide, plain, shape_.narrow);
    Mix(kernels, merged_ ? x : plain, merged_wide, mixed, padded_);
    kernels.walsh_hadamard(mixed, rows_, padded_);
    kernels.copy_signed({mixed, padded_, signs, y, width_, rows_, width_});
  }
}

std::vector<float> UnpackSigns(const uint8_t* bits, int64_t count) {
  std::vector<float> signs(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) signs[size_t(i)] = bits[i / 8] >> i % 8 & 1 ? -1.0f : 1.0f;
  return signs;
}

bool TransformFrames(const KernelTable& kernels, const Frame& frame, const float* signs, const float* x,
                     int64_t rows, float* y, const Parallel& parallel) {
  if (rows == 0) return true;
  Call call{.kernels = kernels, .frame = frame, .signs = signs, .x = x, .y = y, .rows = rows, .step = rows};
  call.step = std::max(CeilDiv(rows, kMostTasks), CeilDiv(kTaskWork, frame.work()));
  const int64_t tasks = CeilDiv(rows, call.step);
  if (tasks > 1) return parallel.run(parallel.pool, RunTask, size_t(tasks), &call) && !call.refused;
  RunTask(&call, 0);
  return !call.refused;
}

}  // namespace onnxq::kernels
