#include "kernels/float8.h"

#include <algorithm>
#include <cmath>

#include "kernels/tasks.h"

namespace onnxq::kernels {
namespace {

// The exponent bias of half precision; of E5M2 the kernels read half of the value: see Isa::Float8.
constexpr int kHalfBias = 15;

const Float8Products& ProductsOf(const KernelTable& kernels, const Float8Weight& weight) {
  return weight.mantissa_bits == 3 ? kernels.float8->e4m3 : kernels.float8->e5m2;
}

struct Product {
  const Float8Weight& weight;
  const float* x;
  Output output;
  TaskGrid grid;
  void (*kernel)(const Float8Weight&, const float*, const Range&, const Output&);
};

void MultiplyTask(void* argument, size_t index) {
  const Product& p = *static_cast<const Product*>(argument);
  p.kernel(p.weight, p.x, p.grid[index], p.output);
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
  if (rows == 0) return true;
  const Float8Products& products = ProductsOf(kernels, weight);
  Product product{.weight = weight,
                  .x = x,
                  .output = {.y = y, .stride = weight.outputs},
                  .grid = TaskGrid(kernels, Activations::kFloat32, rows,
                                   CeilDiv(weight.outputs, kTileOutputs), weight.depth),
                  .kernel = rows <= kFloat8FewRows ? products.few_rows : products.many_rows};
  return RunTasks(parallel, MultiplyTask, product.grid.count(), &product);
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
