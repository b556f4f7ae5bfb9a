#include "kernels/matmul.h"

#include <algorithm>
#include <cstdlib>

#include "kernels/scratch.h"

namespace onnxq::kernels {
namespace {

// Handing a task to a pool costs a few microseconds; below these many products a task is not worth it.
constexpr int64_t kTaskProductsInt8 = 1 << 18;
constexpr int64_t kTaskProductsFloat = 1 << 16;
constexpr int64_t kMostTasks = 64;
// Bounds the rows that are quantised together.
constexpr int64_t kScratchBytes = int64_t{32} << 20;
// Rows of one task: their int8 or float stretch of K stays in the second-level cache.
constexpr int64_t kTaskRowsInt8 = 480;
constexpr int64_t kTaskRowsFloat = 240;

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }

const Products& ProductsOf(const KernelTable& kernels, const Weight& w) {
  if (!w.table) return kernels.uniform[w.bits];
  const CodebookProducts& products = kernels.codebook[w.bits];
  if (w.window == w.bits) return products.window[0];
  // A wider window does as well, since the table repeats itself.
  int i = 0;
  while (kCodebookWindows[i] < w.window) ++i;
  return products.window[1 + i];
}

struct Call {
  const KernelTable& kernels;
  const Weight& weight;
  const float* x;
  float* y;
  int64_t rows;
  QuantizedRows quantized{};
  const float* x_f32 = nullptr;  // what the float kernel reads: x, or a padded copy of its one row
  int64_t prepare_rows = 0;      // rows of one preparing task
  int64_t row_step = 0;          // rows of one computing task
  int64_t tile_step = 0;         // tiles of one computing task
  int64_t tile_tasks = 0;
  void (*kernel_int8)(const Weight&, const QuantizedRows&, const Range&, float*) = nullptr;
  void (*kernel_f32)(const Weight&, const float*, const Range&, float*) = nullptr;
};

void QuantizeTask(void* argument, size_t index) {
  const Call& c = *static_cast<const Call*>(argument);
  const Weight& w = c.weight;
  const int64_t begin = int64_t(index) * c.prepare_rows;
  for (int64_t row = begin; row < std::min(begin + c.prepare_rows, c.rows); ++row) {
    int8_t* codes = c.quantized.codes + row * w.blocks * kBlockDepth;
    c.kernels.quantize_row(w, c.x + row * w.depth, codes, c.quantized.scales + row * w.segment_count,
                           c.quantized.scaled_sum + row * w.segment_count);
    if (c.quantized.starts)
      c.kernels.sum_starts(w, codes, c.quantized.starts + row * w.blocks * kQuads / kStartQuads);
  }
}

void ComputeTask(void* argument, size_t index) {
  const Call& c = *static_cast<const Call*>(argument);
  const int64_t row = int64_t(index) / c.tile_tasks * c.row_step;
  const int64_t tile = int64_t(index) % c.tile_tasks * c.tile_step;
  const Range range{row, std::min(row + c.row_step, c.rows), tile,
                    std::min(tile + c.tile_step, c.weight.tiles)};
  c.kernel_int8 ? c.kernel_int8(c.weight, c.quantized, range, c.y)
                : c.kernel_f32(c.weight, c.x_f32, range, c.y);
}

bool Run(const Parallel& parallel, Parallel::Task task, int64_t count, Call& call) {
  if (count > 1) return parallel.run(parallel.pool, task, size_t(count), &call);
  task(&call, 0);
  return true;
}

bool Compute(const Parallel& parallel, Call& call, int64_t task_rows, int64_t block_rows,
             int64_t task_products) {
  const Weight& w = call.weight;
  call.row_step = std::min(RoundUp(task_rows, block_rows), call.rows);
  const int64_t row_tasks = CeilDiv(call.rows, call.row_step);
  const int64_t tile_products = std::max<int64_t>(1, call.row_step * w.depth * kTileOutputs);
  const int64_t wanted = std::clamp<int64_t>(w.tiles * tile_products / task_products, 1, kMostTasks);
  call.tile_step = CeilDiv(w.tiles, wanted);
  call.tile_tasks = CeilDiv(w.tiles, call.tile_step);
  return Run(parallel, ComputeTask, row_tasks * call.tile_tasks, call);
}

bool MatMulInt8(Call& call, const Parallel& parallel, Scratch& scratch) {
  const Weight& w = call.weight;
  const size_t code_bytes = size_t(call.rows * w.blocks * kBlockDepth);
  const size_t side_bytes = size_t(call.rows * w.segment_count) * sizeof(float);
  const Products& products = ProductsOf(call.kernels, w);
  const bool centred = call.rows > 1 && products.centred;
  const size_t start_bytes = centred ? code_bytes / kStartQuads : 0;
  char* memory = scratch.Get(code_bytes + 2 * side_bytes + start_bytes);
  if (!memory) return false;
  call.quantized = {reinterpret_cast<int8_t*>(memory), reinterpret_cast<float*>(memory + code_bytes),
                    reinterpret_cast<float*>(memory + code_bytes + side_bytes),
                    centred ? reinterpret_cast<int32_t*>(memory + code_bytes + 2 * side_bytes) : nullptr};
  call.prepare_rows = std::clamp<int64_t>(kTaskProductsInt8 / 4 / w.depth, 1, call.rows);
  call.kernel_int8 = call.rows == 1 ? products.gemv_int8 : products.gemm_int8;
  return Run(parallel, QuantizeTask, CeilDiv(call.rows, call.prepare_rows), call) &&
         Compute(parallel, call, kTaskRowsInt8, call.kernels.gemm_rows_int8, kTaskProductsInt8);
}

bool MatMulF32(Call& call, const Parallel& parallel, Scratch& scratch) {
  const Weight& w = call.weight;
  call.x_f32 = call.x;
  const Products& products = ProductsOf(call.kernels, w);
  call.kernel_f32 = products.gemm_f32;
  if (call.rows == 1) {
    call.kernel_f32 = products.gemv_f32;
    const int64_t padded = w.blocks * kBlockDepth;
    if (padded != w.depth) {
      float* copy = reinterpret_cast<float*>(scratch.Get(size_t(padded) * sizeof(float)));
      if (!copy) return false;
      std::copy_n(call.x, w.depth, copy);
      std::fill(copy + w.depth, copy + padded, 0.0f);
      call.x_f32 = copy;
    }
  }
  return Compute(parallel, call, kTaskRowsFloat, call.kernels.gemm_rows_f32, kTaskProductsFloat);
}

}  // namespace

std::vector<Segment> MakeSegments(int64_t depth, int64_t group_size, int64_t* activation_depth) {
  const int64_t blocks = CeilDiv(depth, kBlockDepth);
  const int64_t group_blocks = group_size / kBlockDepth;
  *activation_depth = std::min<int64_t>(group_size, kMaxActivationBlock) / kBlockDepth;
  std::vector<Segment> segments;
  for (int64_t block = 0; block < blocks;) {
    const int64_t group = block / group_blocks;
    const int64_t activation = block / *activation_depth;
    const int64_t end = std::min({(group + 1) * group_blocks, (activation + 1) * *activation_depth, blocks});
    segments.push_back({int32_t(block), int32_t(end - block), int32_t(group), int32_t(activation)});
    block = end;
  }
  return segments;
}

bool MatMul(const KernelTable& kernels, const Weight& weight, Activations activations, const float* x,
            int64_t rows, float* y, const Parallel& parallel) {
  thread_local Scratch scratch;
  const int64_t most =
      RoundUp(std::max<int64_t>(1, kScratchBytes / (weight.blocks * kBlockDepth)), kTaskRowsInt8);
  for (int64_t row = 0; row < rows; row += most) {
    Call call{.kernels = kernels,
              .weight = weight,
              .x = x + row * weight.depth,
              .y = y + row * weight.outputs,
              .rows = std::min(most, rows - row)};
    const bool done = activations == Activations::kInt8 ? MatMulInt8(call, parallel, scratch)
                                                        : MatMulF32(call, parallel, scratch);
    if (!done) return false;
  }
  return true;
}

}  // namespace onnxq::kernels
