#include "kernels/mixed.h"

#include <algorithm>

#include "kernels/scratch.h"
#include "kernels/tasks.h"

namespace onnxq::kernels {
namespace {

// Bounds the inputs that are made ready together. Every band needs its own, so many bands take turns, and so
// do many rows; but each turn of bands puts the inputs in order anew, and each turn of rows unpacks the
// weight anew, so neither may be short.
constexpr int64_t kScratchBytes = int64_t{16} << 20;
constexpr int64_t kFewestRows = 128;
// Inputs that one preparing task makes ready, and at most how many tasks, since each has memory of its own.
constexpr int64_t kTaskInputs = 1 << 15;
constexpr int64_t kMostPrepareTasks = 16;

/// Zero points as the kernels read them: 63.5 of 7-bit levels, 128 of 8-bit ones.
constexpr uint8_t kZero7 = 127;
constexpr uint8_t kZero8 = 128;

/// Bytes of one row's prepared block: as floats, or as codes, their starts, and scale and sum of a segment.
constexpr int64_t BlockBytes(Activations activations) {
  if (activations == Activations::kFloat32) return kBlockDepth * sizeof(float);
  return kBlockDepth + kQuads / kStartQuads * sizeof(int32_t) + 2 * sizeof(float);
}

/// Some rows times some bands.
struct Call {
  const KernelTable& kernels;
  const MixedWeight& weight;
  Activations activations;
  const float* x;
  float* y;
  int64_t rows;
  int64_t band_begin;
  int64_t band_end;
  /// What is ready lies run after run, each [rows, inputs]: the places of these bands' first run.
  int64_t first_block = 0;
  int64_t first_segment = 0;
  QuantizedRows quantized{};
  float* x_f32 = nullptr;
  float* workspace = nullptr;  // [tasks, 2, blocks * 32]
  int64_t prepare_step = 0;    // pairs of a row and a band in one preparing task
  TaskGrid grid{};             // tiles are counted from band_begin on

  const MixedLayout& layout() const { return weight.layout; }
  bool int8() const { return activations == Activations::kInt8; }

  /// The part of `quantized` that belongs to one run.
  QuantizedRows QuantizedOf(const MixedRun& run) const {
    const int64_t block = rows * (run.first_block - first_block);
    const int64_t segment = rows * (run.first_segment - first_segment);
    return {quantized.codes + block * kBlockDepth, quantized.scales + segment, quantized.scaled_sum + segment,
            quantized.starts + block * kQuads / kStartQuads};
  }
  float* FloatsOf(const MixedRun& run) const {
    return x_f32 + rows * (run.first_block - first_block) * kBlockDepth;
  }
};

/// One row in the order in which the weight stores its inputs, whole blocks of them.
void Permute(const MixedWeight& weight, const float* x, float* to) {
  const MixedLayout& layout = weight.layout;
  for (int64_t p = 0; p < layout.depth; ++p) to[p] = x[weight.order[p]];
  std::fill(to + layout.depth, to + layout.blocks * kBlockDepth, 0.0f);
}

/// Makes one row ready for one band.
void PrepareBand(const Call& c, int64_t row, int64_t band, const float* stored, float* scaled) {
  const MixedLayout& layout = c.layout();
  const uint8_t* columns = c.weight.columns + band * layout.blocks * kBlockDepth;
  for (int64_t r = layout.band_runs[size_t(band)]; r < layout.band_runs[size_t(band) + 1]; ++r) {
    const MixedRun& run = layout.runs[size_t(r)];
    const Weight& w = run.weight;
    const int64_t at = row * w.depth;
    float* to = c.int8() ? scaled : c.FloatsOf(run) + at;
    c.kernels.scale_columns(stored, columns, c.weight.steps[w.bits],
                            layout.run_blocks.data() + run.first_block, w.blocks, to);
    if (!c.int8()) continue;
    const QuantizedRows rows = c.QuantizedOf(run);
    const int64_t segment = row * w.segment_count;
    c.kernels.quantize_row(w, scaled, rows.codes + at, rows.scales + segment, rows.scaled_sum + segment);
    if (c.rows > 1 && ProductsOf(c.kernels, w.bits, w.window).centred)
      c.kernels.sum_starts(w, rows.codes + at, rows.starts + row * w.blocks * kQuads / kStartQuads);
  }
}

void PrepareTask(void* argument, size_t index) {
  const Call& c = *static_cast<const Call*>(argument);
  const int64_t width = c.layout().blocks * kBlockDepth;
  const int64_t bands = c.band_end - c.band_begin;
  float* stored = c.workspace + int64_t(index) * 2 * width;
  int64_t row = -1;
  const int64_t begin = int64_t(index) * c.prepare_step;
  for (int64_t i = begin; i < std::min(begin + c.prepare_step, c.rows * bands); ++i) {
    if (i / bands != row) {
      row = i / bands;
      Permute(c.weight, c.x + row * c.layout().depth, stored);
    }
    PrepareBand(c, row, c.band_begin + i % bands, stored, stored + width);
  }
}

/// A band without any weight.
void FillWithBias(const Call& c, const Range& range, int64_t first, int64_t outputs) {
  const MixedWeight& w = c.weight;
  const int64_t begin = range.tile_begin * kTileOutputs;
  const int64_t end = std::min(range.tile_end * kTileOutputs, outputs);
  for (int64_t row = range.row_begin; row < range.row_end; ++row)
    for (int64_t n = first + begin; n < first + end; ++n)
      c.y[row * c.layout().outputs + n] = w.bias[w.shared_bias ? 0 : n];
}

/// Rows and tiles of one band; tiles are counted from its first one.
void ComputeBand(const Call& c, int64_t band, const Range& range) {
  const MixedLayout& layout = c.layout();
  const int64_t first_tile = band * layout.band_tiles;
  const int64_t first = first_tile * kTileOutputs;
  const int64_t run_begin = layout.band_runs[size_t(band)];
  const int64_t run_end = layout.band_runs[size_t(band) + 1];
  if (run_begin == run_end)
    return FillWithBias(c, range, first, std::min(layout.band_tiles * kTileOutputs, layout.outputs - first));
  for (int64_t r = run_begin; r < run_end; ++r) {
    const MixedRun& run = layout.runs[size_t(r)];
    Weight w = run.weight;
    w.packed = c.weight.packed + run.offset;
    w.scales = c.weight.scales + first;
    w.zeros = w.bits == kMaxDepth ? &kZero8 : &kZero7;
    w.table = w.window > 0 ? c.weight.tables + (w.bits - 1) * kTableEntries : nullptr;
    w.bias = c.weight.shared_bias ? c.weight.bias : c.weight.bias + first;
    w.shared_bias = c.weight.shared_bias;
    w.gain = c.weight.gain;
    const Output output{
        .y = c.y + first, .stride = layout.outputs, .resumes = r > run_begin, .unfinished = r + 1 < run_end};
    const Products& products = ProductsOf(c.kernels, w.bits, w.window);
    if (c.int8()) {
      const auto kernel = c.rows == 1 ? products.gemv_int8 : products.gemm_int8;
      kernel(w, c.QuantizedOf(run), range, output);
    } else {
      const auto kernel = c.rows == 1 ? products.gemv_f32 : products.gemm_f32;
      kernel(w, c.FloatsOf(run), range, output);
    }
  }
}

void ComputeTask(void* argument, size_t index) {
  const Call& c = *static_cast<const Call*>(argument);
  const int64_t band_tiles = c.layout().band_tiles;
  const Range range = c.grid[index];
  for (int64_t tile = range.tile_begin; tile < range.tile_end;) {
    const int64_t band = tile / band_tiles;
    const int64_t end = std::min((band + 1) * band_tiles, range.tile_end);
    ComputeBand(c, c.band_begin + band,
                {range.row_begin, range.row_end, tile - band * band_tiles, end - band * band_tiles});
    tile = end;
  }
}

/// The blocks that the runs of the bands before `band` hold.
int64_t FirstBlock(const MixedLayout& layout, int64_t band) {
  const int64_t run = layout.band_runs[size_t(band)];
  return run < int64_t(layout.runs.size()) ? layout.runs[size_t(run)].first_block
                                           : int64_t(layout.run_blocks.size());
}

/// The end of the bands from `begin` on whose blocks fit: at least one band.
int64_t BandsThatFit(const MixedLayout& layout, int64_t begin, int64_t blocks) {
  int64_t end = begin + 1;
  while (end < layout.bands && FirstBlock(layout, end + 1) - FirstBlock(layout, begin) <= blocks) ++end;
  return end;
}

bool Run(Call& call, const Parallel& parallel, Scratch& scratch) {
  const MixedLayout& layout = call.layout();
  const int64_t blocks = FirstBlock(layout, call.band_end) - FirstBlock(layout, call.band_begin);
  const int64_t width = layout.blocks * kBlockDepth;
  const int64_t pairs = call.rows * (call.band_end - call.band_begin);
  const int64_t tasks =
      std::clamp<int64_t>(pairs * width / kTaskInputs, 1, std::min(pairs, kMostPrepareTasks));
  const size_t ready_bytes = size_t(call.rows * blocks * BlockBytes(call.activations));
  char* memory = scratch.Get(ready_bytes + size_t(tasks * 2 * width) * sizeof(float));
  if (!memory) return false;
  if (blocks > 0) {
    const MixedRun& first = layout.runs[size_t(layout.band_runs[size_t(call.band_begin)])];
    call.first_block = first.first_block;
    call.first_segment = first.first_segment;
    const int64_t row_blocks = call.rows * blocks;
    float* floats = reinterpret_cast<float*>(memory);
    call.x_f32 = floats;
    // No more segments than blocks.
    call.quantized = {.codes = reinterpret_cast<int8_t*>(floats + 2 * row_blocks) +
                               row_blocks * kQuads / kStartQuads * int64_t{sizeof(int32_t)},
                      .scales = floats,
                      .scaled_sum = floats + row_blocks,
                      .starts = reinterpret_cast<int32_t*>(floats + 2 * row_blocks)};
    call.workspace = reinterpret_cast<float*>(memory + ready_bytes);
    call.prepare_step = CeilDiv(pairs, tasks);
    if (!RunTasks(parallel, PrepareTask, CeilDiv(pairs, call.prepare_step), &call)) return false;
  }
  const int64_t tiles =
      std::min(call.band_end * layout.band_tiles, layout.tiles) - call.band_begin * layout.band_tiles;
  call.grid = TaskGrid(call.kernels, call.activations, call.rows, tiles, layout.depth);
  return RunTasks(parallel, ComputeTask, call.grid.count(), &call);
}

}  // namespace

MixedLayout::MixedLayout(int64_t outputs, int64_t depth, int64_t band, const uint8_t* depths)
    : outputs(outputs),
      depth(depth),
      tiles(CeilDiv(outputs, kTileOutputs)),
      blocks(CeilDiv(depth, kBlockDepth)),
      band_tiles(std::min(band / kTileOutputs, tiles)),
      bands(CeilDiv(tiles, band_tiles)),
      band_runs{0} {
  for (int64_t m = 0; m < bands; ++m, depths += blocks) {
    for (int bits = 1; bits <= kMaxDepth; ++bits) {
      const int64_t first_block = int64_t(run_blocks.size());
      for (int64_t b = 0; b < blocks; ++b)
        if (depths[b] == bits) run_blocks.push_back(int32_t(b));
      const int64_t count = int64_t(run_blocks.size()) - first_block;
      if (count == 0) continue;
      Weight w{};
      w.bits = bits;
      w.window = bits <= kTableDepths ? std::max(bits, kMixedWindow) : 0;
      w.shared_zero = true;
      w.outputs = std::min(band_tiles * kTileOutputs, outputs - m * band_tiles * kTileOutputs);
      w.depth = count * kBlockDepth;
      w.tiles = CeilDiv(w.outputs, kTileOutputs);
      w.blocks = w.group_blocks = count;
      w.groups = 1;
      const std::vector<Segment> segments = MakeSegments(w.depth, w.depth, &w.activation_depth);
      w.segment_count = int64_t(segments.size());
      runs.push_back(
          {.weight = w, .offset = 0, .first_block = first_block, .first_segment = int64_t(segments_.size())});
      segments_.insert(segments_.end(), segments.begin(), segments.end());
    }
    band_runs.push_back(int64_t(runs.size()));
  }
  for (MixedRun& run : runs) run.weight.segments = segments_.data() + run.first_segment;
  for (int bits = 1; bits <= kMaxDepth; ++bits)
    for (MixedRun& run : runs) {
      if (run.weight.bits != bits) continue;
      run.offset = packed_bytes;
      packed_bytes += run.weight.tiles * run.weight.blocks * bits * kRowBytes;
    }
}

bool MatMulMixed(const KernelTable& kernels, const MixedWeight& weight, Activations activations,
                 const float* x, int64_t rows, float* y, const Parallel& parallel) {
  thread_local Scratch scratch;
  const MixedLayout& layout = weight.layout;
  const int64_t most_blocks = kScratchBytes / BlockBytes(activations);
  const int64_t block_rows =
      activations == Activations::kInt8 ? kernels.gemm_rows_int8 : kernels.gemm_rows_f32;
  const int64_t all_blocks = std::max<int64_t>(1, int64_t(layout.run_blocks.size()));
  const int64_t wanted = std::clamp(most_blocks / all_blocks, kFewestRows, kTaskRowsInt8);
  const int64_t most_rows = RoundUp(std::clamp<int64_t>(most_blocks / layout.blocks, 1, wanted), block_rows);
  for (int64_t row = 0; row < rows; row += most_rows) {
    const int64_t count = std::min(most_rows, rows - row);
    for (int64_t band = 0; band < layout.bands;) {
      const int64_t end = BandsThatFit(layout, band, most_blocks / count);
      Call call{.kernels = kernels,
                .weight = weight,
                .activations = activations,
                .x = x + row * layout.depth,
                .y = y + row * layout.outputs,
                .rows = count,
                .band_begin = band,
                .band_end = end};
      if (!Run(call, parallel, scratch)) return false;
      band = end;
    }
  }
  return true;
}

}  // namespace onnxq::kernels
