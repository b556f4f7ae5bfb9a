#include "kernels/float8.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/scratch.h"
#include "kernels/tasks.h"

namespace onnxq::kernels {
namespace {

// The exponent bias of half precision; of E5M2 the kernels read half of the value: see Isa::Float8.
constexpr int kHalfBias = 15;

const Float8Products& ProductsOf(const KernelTable& kernels, const Float8Weight& weight) {
  return weight.mantissa_bits == 3 ? kernels.float8->e4m3 : kernels.float8->e5m2;
}

// Bounds the copy of x.
constexpr int64_t kCopiedFloats = int64_t{2} << 20;

struct Product {
  const Float8Weight& weight;
  const float* x;  // strips, where rows are many
  int64_t rows;
  Output output;
  TaskGrid grid;
  void (*kernel)(const Float8Weight&, const float*, const Range&, const Output&);
};

void MultiplyTask(void* argument, size_t index) {
  const Product& p = *static_cast<const Product*>(argument);
  p.kernel(p.weight, p.x, p.grid[index], p.output);
}

using Float4 = float __attribute__((vector_size(16)));

ONNXQ_INLINE Float4 Load(const float* x) {
  Float4 v;
  std::memcpy(&v, x, sizeof v);
  return v;
}

/// to [4, stride], at 0 to 4: columns a, b, c, d.
ONNXQ_INLINE void StoreTurned(Float4 a, Float4 b, Float4 c, Float4 d, float* to, int64_t stride) {
  const Float4 ab[] = {__builtin_shufflevector(a, b, 0, 4, 1, 5), __builtin_shufflevector(a, b, 2, 6, 3, 7)};
  const Float4 cd[] = {__builtin_shufflevector(c, d, 0, 4, 1, 5), __builtin_shufflevector(c, d, 2, 6, 3, 7)};
  for (int i = 0; i < 2; ++i, to += 2 * stride) {
    const Float4 even = __builtin_shufflevector(ab[i], cd[i], 0, 1, 4, 5);
    const Float4 odd = __builtin_shufflevector(ab[i], cd[i], 2, 3, 6, 7);
    std::memcpy(to, &even, sizeof even);
    std::memcpy(to + stride, &odd, sizeof odd);
  }
}

/// The same at 0 to 2.
ONNXQ_INLINE void StoreTurned(Float4 a, Float4 b, float* to, int64_t stride) {
  const Float4 ab[] = {__builtin_shufflevector(a, b, 0, 4, 1, 5), __builtin_shufflevector(a, b, 2, 6, 3, 7)};
  for (int64_t i = 0; i < 4; ++i) std::memcpy(to + i * stride, reinterpret_cast<const char*>(ab) + 8 * i, 8);
}

/// to [depth, rows] = x [rows, count], zero from `count` inputs on.
void TurnStrip(const float* x, int64_t stride, int64_t rows, int64_t count, int64_t depth, float* to) {
  const int64_t whole = count / 4 * 4;
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) {
    const float* from = x + row * stride;
    for (int64_t k = 0; k < whole; k += 4)
      StoreTurned(Load(from + k), Load(from + stride + k), Load(from + 2 * stride + k),
                  Load(from + 3 * stride + k), to + k * rows + row, rows);
  }
  if (row + 2 <= rows) {
    const float* from = x + row * stride;
    for (int64_t k = 0; k < whole; k += 4)
      StoreTurned(Load(from + k), Load(from + stride + k), to + k * rows + row, rows);
    row += 2;
  }
  if (row < rows)
    for (int64_t k = 0; k < whole; ++k) to[k * rows + row] = x[row * stride + k];
  for (int64_t k = whole; k < depth; ++k)
    for (int64_t r = 0; r < rows; ++r) to[k * rows + r] = k < count ? x[r * stride + k] : 0.0f;
}

/// x [rows, depth] to strips.
struct Copying {
  const float* x;
  int64_t rows;
  int64_t depth;
  int64_t range_rows;
  int block_rows;
  int64_t step;   // strips of one task
  int64_t tasks;  // of one range
  float* to;
};

void CopyTask(void* argument, size_t index) {
  const Copying& c = *static_cast<const Copying*>(argument);
  const int64_t first = int64_t(index) / c.tasks * c.range_rows;
  const Float8Strips strips(std::min(c.range_rows, c.rows - first), c.block_rows);
  const int64_t strip = int64_t(index) % c.tasks * c.step;
  float* chunk = c.to + first * Float8Strips::Depth(c.depth);
  for (int64_t k = 0; k < c.depth; k += kFloat8Chunk) {
    const int64_t count = std::min(kFloat8Chunk, c.depth - k), depth = Float8Strips::Depth(count);
    for (int64_t i = strip; i < std::min(strip + c.step, strips.count); ++i) {
      const int64_t row = strips.begin(i);
      TurnStrip(c.x + (first + row) * c.depth + k, c.depth, strips.begin(i + 1) - row, count, depth,
                chunk + row * depth);
    }
    chunk += strips.rows * depth;
  }
}

/// Many rows: the product reads a copy of x.
bool MultiplyStrips(const KernelTable& kernels, Product& product, const Parallel& parallel) {
  thread_local Scratch scratch;
  const int64_t depth = product.weight.depth, range_rows = product.grid[0].row_end;
  const int block_rows = kernels.gemm_rows_f32;
  const int64_t step = std::max<int64_t>(1, kTaskElements / (depth * block_rows));
  const size_t floats = size_t(product.rows * Float8Strips::Depth(depth));
  Copying copying{.x = product.x,
                  .rows = product.rows,
                  .depth = depth,
                  .range_rows = range_rows,
                  .block_rows = block_rows,
                  .step = step,
                  .tasks = CeilDiv(CeilDiv(range_rows, block_rows), step),
                  .to = reinterpret_cast<float*>(scratch.Get(floats * sizeof(float)))};
  if (!copying.to) return false;
  product.x = copying.to;
  const bool done =
      RunTasks(parallel, CopyTask, CeilDiv(product.rows, range_rows) * copying.tasks, &copying) &&
      RunTasks(parallel, MultiplyTask, product.grid.count(), &product);
  scratch.KeepAtMost(kCopiedFloats * sizeof(float));
  return done;
}

/// Rows of one width, with one scale for all of them or one for each.
struct Rounding {
  const Float8Kernels& kernels;
  const Float8Kind& kind;
  const float* scale;  // null: one for each row
  const float* x;
  float* y;
  int64_t rows;
  int64_t width;
  int64_t step = 1;  // rows of one task
};

void RoundTask(void* argument, size_t index) {
  const Rounding& r = *static_cast<const Rounding*>(argument);
  const int64_t begin = int64_t(index) * r.step;
  const int64_t end = std::min(begin + r.step, r.rows);
  const float* x = r.x + begin * r.width;
  float* y = r.y + begin * r.width;
  if (r.scale) return r.kernels.round(r.kind, *r.scale, x, (end - begin) * r.width, y);
  for (int64_t row = begin; row < end; ++row, x += r.width, y += r.width) {
    const float scale = r.kernels.largest_magnitude(x, r.width) / r.kind.largest;
    r.kernels.round(r.kind, scale == 0.0f ? 1.0f : scale, x, r.width, y);
  }
}

bool RoundRows(Rounding rounding, const Parallel& parallel) {
  if (rounding.rows == 0 || rounding.width == 0) return true;
  rounding.step = std::max<int64_t>(1, kTaskElements / rounding.width);
  return RunTasks(parallel, RoundTask, CeilDiv(rounding.rows, rounding.step), &rounding);
}

}  // namespace

float Float8Unit(const Float8Kind& kind) {
  return std::ldexp(1.0f, kHalfBias - kind.exponent_bias + (kind.mantissa_bits == 2 ? 1 : 0));
}

bool MatMulFloat8(const KernelTable& kernels, const Float8Weight& weight, const float* x, int64_t rows,
                  float* y, const Parallel& parallel) {
  const Float8Products& products = ProductsOf(kernels, weight);
  const bool few = rows <= kFloat8FewRows;
  const int64_t most = std::max<int64_t>(1, kCopiedFloats / weight.depth / kTaskRowsFloat) * kTaskRowsFloat;
  for (int64_t row = 0; row < rows; row += most) {
    const int64_t count = std::min(most, rows - row);
    Product product{.weight = weight,
                    .x = x + row * weight.depth,
                    .rows = count,
                    .output = {.y = y + row * weight.outputs, .stride = weight.outputs},
                    .grid = TaskGrid(kernels, Activations::kFloat32, count,
                                     CeilDiv(weight.outputs, kTileOutputs), weight.depth),
                    .kernel = few ? products.few_rows : products.many_rows};
    const bool done = few ? RunTasks(parallel, MultiplyTask, product.grid.count(), &product)
                          : MultiplyStrips(kernels, product, parallel);
    if (!done) return false;
  }
  return true;
}

void DecodeFloat8Row(const KernelTable& kernels, const Float8Weight& weight, int64_t row, float* out) {
  ProductsOf(kernels, weight).decode_row(weight, row, out);
}

bool RoundFloat8(const KernelTable& kernels, const Float8Kind& kind, float scale, const float* x,
                 int64_t count, float* y, const Parallel& parallel) {
  return RoundRows({*kernels.float8, kind, &scale, x, y, count, 1}, parallel);
}

bool RoundFloat8Rows(const KernelTable& kernels, const Float8Kind& kind, const float* x, int64_t rows,
                     int64_t width, float* y, const Parallel& parallel) {
  return RoundRows({*kernels.float8, kind, nullptr, x, y, rows, width}, parallel);
}

}  // namespace onnxq::kernels
