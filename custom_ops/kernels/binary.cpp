#include "kernels/binary.h"

#include <algorithm>

#include "kernels/compiler.h"
#include "kernels/half.h"
#include "kernels/scratch.h"
#include "kernels/tables.h"
#include "kernels/tasks.h"

namespace onnxq::kernels {
namespace {

// Bounds the rows that are computed together: their tables, and their outputs in stored order.
constexpr int64_t kScratchBytes = int64_t{32} << 20;
constexpr float kNoBias = 0.0f;
// Float tables of more rows than these no longer stay in the caches.
constexpr int64_t kMostFloatRows = 8;
// Decoding one plane of the weight takes as long as multiplying so many rows by it.
constexpr double kDecodeCost = 2.0;

/// What is looked up, if anything: otherwise the weight is decoded.
enum class Look { kBytes, kFloats, kNothing };

struct Call {
  const BinaryKernels& kernels;
  const BinaryWeight& weight;
  const BinaryWeight& stored;  // the same, or without a bias where outputs are put in order afterwards
  Look look;
  const float* x;
  int64_t rows;
  float* y;
  Output output{};
  BinaryTables tables{};
  TaskGrid grid{};
  int64_t row_step = 1;  // rows of one preparing or placing task
};

BinaryTables TablesOf(const Call& c, int64_t row) {
  const BinaryWeight& w = c.weight;
  return {.bytes = c.tables.bytes + row * w.chunks * kKeys * c.kernels.copies,
          .floats = c.tables.floats + row * w.chunks * kKeys,
          .scales = c.tables.scales + row * w.groups * w.group_tables,
          .sums = c.tables.sums + row * w.groups};
}

void PrepareTask(void* argument, size_t index) {
  const Call& c = *static_cast<const Call*>(argument);
  const auto make = c.look == Look::kBytes ? c.kernels.make_bytes : c.kernels.make_floats;
  const int64_t begin = int64_t(index) * c.row_step;
  for (int64_t row = begin; row < std::min(begin + c.row_step, c.rows); ++row)
    make(c.weight, c.x + row * c.weight.depth, TablesOf(c, row));
}

void ComputeTask(void* argument, size_t index) {
  const Call& c = *static_cast<const Call*>(argument);
  const Range range = c.grid[index];
  if (c.look == Look::kNothing) return c.kernels.many_rows(c.stored, c.x, range, c.output);
  const auto look = c.look == Look::kBytes ? c.kernels.look_bytes : c.kernels.look_floats;
  look(c.stored, c.tables, range, c.output);
}

/// From stored order to that of the outputs.
void PlaceTask(void* argument, size_t index) {
  const Call& c = *static_cast<const Call*>(argument);
  const BinaryWeight& w = c.weight;
  const int64_t begin = int64_t(index) * c.row_step;
  for (int64_t row = begin; row < std::min(begin + c.row_step, c.rows); ++row) {
    const float* from = c.output.y + row * w.outputs;
    float* to = c.y + row * w.outputs;
    if (w.shared_bias) {
      for (int64_t n = 0; n < w.outputs; ++n) to[n] = from[w.rank[n]] + w.bias[0];
    } else {
      for (int64_t n = 0; n < w.outputs; ++n) to[n] = from[w.rank[n]] + w.bias[n];
    }
  }
}

/// The faster way for so many rows: tables are looked up once for every plane, a decoded weight is multiplied
/// once.
Look ChooseLook(const BinaryKernels& kernels, const BinaryWeight& w, Activations activations, int64_t rows) {
  double planes = 0.0;
  for (int p = 0; p < w.plane_count; ++p) planes += double(w.planes[p].rows) / double(w.outputs);
  const bool bytes = activations == Activations::kInt8;
  const double looking = planes * double(rows) * (bytes ? kernels.bytes_cost : kernels.floats_cost);
  if (rows > 1 && looking > double(rows) + kDecodeCost * planes) return Look::kNothing;
  if (bytes) return Look::kBytes;
  return rows <= kMostFloatRows ? Look::kFloats : Look::kNothing;
}

/// Bytes of one row's scratch memory, every part of it a multiple of 4.
struct RowBytes {
  int64_t tables, scales, sums, outputs;

  RowBytes(const BinaryKernels& kernels, const BinaryWeight& w, Look look)
      : tables(look == Look::kNothing
                   ? 0
                   : w.chunks * kKeys * (look == Look::kBytes ? kernels.copies : int64_t{sizeof(float)})),
        scales(look == Look::kBytes ? w.groups * w.group_tables * int64_t{sizeof(float)} : 0),
        sums(look == Look::kNothing ? 0 : w.groups * int64_t{sizeof(float)}),
        outputs(w.rank ? w.outputs * int64_t{sizeof(float)} : 0) {}
  int64_t all() const { return tables + scales + sums + outputs; }
};

bool Run(Call& call, const RowBytes& bytes, const Parallel& parallel, Scratch& scratch) {
  const BinaryWeight& w = call.weight;
  char* memory = scratch.Get(size_t(std::max<int64_t>(1, call.rows * bytes.all())));
  if (!memory) return false;
  call.tables = {.bytes = reinterpret_cast<uint8_t*>(memory),
                 .floats = reinterpret_cast<float*>(memory),
                 .scales = reinterpret_cast<float*>(memory + call.rows * bytes.tables),
                 .sums = reinterpret_cast<float*>(memory + call.rows * (bytes.tables + bytes.scales))};
  call.output = {.y = call.y, .stride = w.outputs};
  if (w.rank) call.output.y = call.tables.sums + call.rows * bytes.sums / int64_t{sizeof(float)};
  call.row_step = std::max<int64_t>(1, kTaskElements / (4 * w.depth));
  if (call.look != Look::kNothing &&
      !RunTasks(parallel, PrepareTask, CeilDiv(call.rows, call.row_step), &call))
    return false;
  const Activations activations = call.look == Look::kBytes ? Activations::kInt8 : Activations::kFloat32;
  // A tile is two of those that the grid counts with.
  call.grid = TaskGrid(*call.kernels.common, activations, call.rows, w.tiles, 2 * w.depth);
  if (!RunTasks(parallel, ComputeTask, call.grid.count(), &call)) return false;
  if (!w.rank) return true;
  call.row_step = std::max<int64_t>(1, kTaskElements / w.outputs);
  return RunTasks(parallel, PlaceTask, CeilDiv(call.rows, call.row_step), &call);
}

}  // namespace

const BinaryKernels& BinaryKernelsOf(const KernelTable& kernels) {
#ifdef ONNXQ_X86
  if (kAvx512VnniBinary.common == &kernels) return kAvx512VnniBinary;
  if (kAvx2Binary.common == &kernels) return kAvx2Binary;
#endif
  return kScalarBinary;
}

bool MatMulBinary(const BinaryKernels& kernels, const BinaryWeight& weight, Activations activations,
                  const float* x, int64_t rows, float* y, const Parallel& parallel) {
  thread_local Scratch scratch;
  BinaryWeight stored = weight;
  if (weight.rank) {
    stored.bias = &kNoBias;
    stored.shared_bias = true;
  }
  const Look look = ChooseLook(kernels, weight, activations, rows);
  const RowBytes bytes(kernels, weight, look);
  const int64_t most = bytes.all() == 0 ? rows : std::max<int64_t>(1, kScratchBytes / bytes.all());
  for (int64_t row = 0; row < rows; row += most) {
    Call call{.kernels = kernels,
              .weight = weight,
              .stored = stored,
              .look = look,
              .x = x + row * weight.depth,
              .rows = std::min(most, rows - row),
              .y = y + row * weight.outputs};
    if (!Run(call, bytes, parallel, scratch)) return false;
  }
  return true;
}

void DecodeBinaryRow(const BinaryWeight& w, int64_t row, float* out) {
  if (w.rank) row = w.rank[row];
  const int64_t tile = row / kBinaryTile;
  const int64_t lane = row % kBinaryTile;
  const int shift = lane < kBinaryHalf ? 0 : 4;
  for (int64_t group = 0, k = 0; group < w.groups; ++group) {
    const int64_t begin = k;
    const int64_t end = std::min((group + 1) * w.group_depth, w.depth);
    const int64_t side = (tile * w.groups + group) * kBinaryTile + lane;
    const float offset = w.offsets ? HalfToFloat(w.offsets[side]) : 0.0f;
    std::fill(out + begin, out + end, offset);
    for (int p = 0; p < w.plane_count && row < w.planes[p].rows; ++p) {
      const float scale = HalfToFloat(w.planes[p].scales[side]);
      const float signs[2] = {-scale, scale};
      const uint8_t* keys =
          w.planes[p].codes + (tile * w.chunks + begin / kChunkDepth) * kBinaryHalf + lane % kBinaryHalf;
      for (k = begin; k < end; k += kChunkDepth, keys += kBinaryHalf) {
        const int key = *keys >> shift;
        for (int64_t j = 0; j < std::min<int64_t>(kChunkDepth, end - k); ++j)
          out[k + j] += signs[key >> j & 1];
      }
    }
    for (int64_t i = begin; i < end; ++i) out[i] *= w.gain;
    k = end;
  }
}

}  // namespace onnxq::kernels
