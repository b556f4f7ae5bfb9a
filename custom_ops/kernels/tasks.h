// How work is cut into tasks: what all products share.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "kernels/matmul.h"
#include "kernels/problem.h"

namespace onnxq::kernels {

// Handing a task to a pool costs a few microseconds; below these many products a task is not worth it.
constexpr int64_t kTaskProductsInt8 = 1 << 18;
constexpr int64_t kTaskProductsFloat = 1 << 16;
constexpr int64_t kMostTasks = 64;
// The same for elements that are decoded or rounded.
constexpr int64_t kTaskElements = 1 << 15;
// Rows of one task: their int8 or float stretch of K stays in the second-level cache.
constexpr int64_t kTaskRowsInt8 = 480;
constexpr int64_t kTaskRowsFloat = 240;

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }

/// window: bits of an index into a table; 0 when codes are levels.
inline const Products& ProductsOf(const KernelTable& kernels, int bits, int window) {
  if (window == 0) return kernels.uniform[bits];
  const CodebookProducts& products = kernels.codebook[bits];
  if (window == bits) return products.window[0];
  // A wider window does as well, since the table repeats itself.
  int i = 0;
  while (kCodebookWindows[i] < window) ++i;
  return products.window[1 + i];
}

/// Row stretches times tile stretches of one output.
class TaskGrid {
 public:
  TaskGrid() = default;
  TaskGrid(const KernelTable& kernels, Activations activations, int64_t rows, int64_t tiles, int64_t depth)
      : rows_(rows), tiles_(tiles) {
    const bool int8 = activations == Activations::kInt8;
    const int64_t block_rows = int8 ? kernels.gemm_rows_int8 : kernels.gemm_rows_f32;
    row_step_ = std::min(RoundUp(int8 ? kTaskRowsInt8 : kTaskRowsFloat, block_rows), rows);
    const int64_t tile_products = std::max<int64_t>(1, row_step_ * depth * kTileOutputs);
    const int64_t task_products = int8 ? kTaskProductsInt8 : kTaskProductsFloat;
    const int64_t wanted = std::clamp<int64_t>(tiles * tile_products / task_products, 1, kMostTasks);
    tile_step_ = CeilDiv(tiles, wanted);
    tile_tasks_ = CeilDiv(tiles, tile_step_);
  }

  int64_t count() const { return CeilDiv(rows_, row_step_) * tile_tasks_; }

  Range operator[](size_t index) const {
    const int64_t row = int64_t(index) / tile_tasks_ * row_step_;
    const int64_t tile = int64_t(index) % tile_tasks_ * tile_step_;
    return {row, std::min(row + row_step_, rows_), tile, std::min(tile + tile_step_, tiles_)};
  }

 private:
  int64_t rows_ = 0;
  int64_t tiles_ = 0;
  int64_t row_step_ = 1;
  int64_t tile_step_ = 1;
  int64_t tile_tasks_ = 1;
};

inline bool RunTasks(const Parallel& parallel, Parallel::Task task, int64_t count, void* argument) {
  if (count > 1) return parallel.run(parallel.pool, task, size_t(count), argument);
  task(argument, 0);
  return true;
}

}  // namespace onnxq::kernels
