#include "kernels/matmul.h"

#include <algorithm>

#include "kernels/scratch.h"
#include "kernels/tasks.h"

namespace onnxq::kernels {
namespace {

// Bounds the rows that are quantised together.
constexpr int64_t kScratchBytes = int64_t{32} << 20;

struct Call {
  const KernelTable& kernels;
  const Weight& weight;
  const float* x;
  int64_t rows;
  Output output;
  QuantizedRows quantized{};
  const float* x_f32 = nullptr;  // what the float kernel reads: x, or a padded copy of its one row
  int64_t prepare_rows = 0;      // rows of one preparing task
  TaskGrid grid{};
  void (*kernel_int8)(const Weight&, const QuantizedRows&, const Range&, const Output&) = nullptr;
  void (*kernel_f32)(const Weight&, const float*, const Range&, const Output&) = nullptr;
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
  c.kernel_int8 ? c.kernel_int8(c.weight, c.quantized, c.grid[index], c.output)
                : c.kernel_f32(c.weight, c.x_f32, c.grid[index], c.output);
}

bool Compute(const Parallel& parallel, Call& call, Activations activations) {
  call.grid = TaskGrid(call.kernels, activations, call.rows, call.weight.tiles, call.weight.depth);
  return RunTasks(parallel, ComputeTask, call.grid.count(), &call);
}

bool MatMulInt8(Call& call, const Parallel& parallel, Scratch& scratch) {
  const Weight& w = call.weight;
  const size_t code_bytes = size_t(call.rows * w.blocks * kBlockDepth);
  const size_t side_bytes = size_t(call.rows * w.segment_count) * sizeof(float);
  const Products& products = ProductsOf(call.kernels, w.bits, w.table ? w.window : 0);
  const bool centred = call.rows > 1 && products.centred;
  const size_t start_bytes = centred ? code_bytes / kStartQuads : 0;
  char* memory = scratch.Get(code_bytes + 2 * side_bytes + start_bytes);
  if (!memory) return false;
  call.quantized = {reinterpret_cast<int8_t*>(memory), reinterpret_cast<float*>(memory + code_bytes),
                    reinterpret_cast<float*>(memory + code_bytes + side_bytes),
                    centred ? reinterpret_cast<int32_t*>(memory + code_bytes + 2 * side_bytes) : nullptr};
  call.prepare_rows = std::clamp<int64_t>(kTaskProductsInt8 / 4 / w.depth, 1, call.rows);
  call.kernel_int8 = call.rows == 1 ? products.gemv_int8 : products.gemm_int8;
  return RunTasks(parallel, QuantizeTask, CeilDiv(call.rows, call.prepare_rows), &call) &&
         Compute(parallel, call, Activations::kInt8);
}

bool MatMulF32(Call& call, const Parallel& parallel, Scratch& scratch) {
  const Weight& w = call.weight;
  call.x_f32 = call.x;
  const Products& products = ProductsOf(call.kernels, w.bits, w.table ? w.window : 0);
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
  return Compute(parallel, call, Activations::kFloat32);
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
              .rows = std::min(most, rows - row),
              .output = {.y = y + row * weight.outputs, .stride = weight.outputs}};
    const bool done = activations == Activations::kInt8 ? MatMulInt8(call, parallel, scratch)
                                                        : MatMulF32(call, parallel, scratch);
    if (!done) return false;
  }
  return true;
}

}  // namespace onnxq::kernels
