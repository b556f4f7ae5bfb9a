// Every kernel of one ISA against a literal reading of the layout, over bits, groups, ragged shapes and row
// counts. Buffers are exactly as long as the layout says, so that a sanitizer build sees any read beyond
// them.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "kernels/dispatch.h"
#include "kernels/gather.h"
#include "kernels/half.h"
#include "kernels/matmul.h"
#include "tests/harness.h"

namespace {

using namespace onnxq::kernels;
using namespace onnxq::tests;

// Largest error over sum |x| * (|W| + scale * 2**bits): float32 sums in any order.
constexpr double kFloatTolerance = 1e-6;
// The int8 round trip is reproduced exactly, so the same holds for it.
constexpr double kInt8Tolerance = 1e-6;

/// The code of output n, input k, read bit by bit as the layout's text says.
int CodeAt(const Weight& w, int64_t n, int64_t k) {
  const int64_t block = (n / 32 * w.blocks + k / 32) * w.bits;
  const int q = int(k % 32 / 4);
  int row = 0, low = 0, code = 0;
  for (int width = 8; width > 0; width /= 2) {
    if (!(w.bits & width)) continue;
    const int fields = 8 / width;
    const uint8_t byte = w.packed[((block + row + q / fields) * 32 + n % 32) * 4 + k % 4];
    code |= ((byte >> (q % fields * width)) & ((1 << width) - 1)) << low;
    row += width;
    low += width;
  }
  return code;
}

/// The level that a code stands for: itself, or what the table says for it and the codes 32, 64, ... outputs
/// before.
int LevelAt(const Weight& w, int64_t n, int64_t k) {
  if (!w.table) return CodeAt(w, n, k);
  int index = 0;
  for (int shift = 0; shift < w.window; shift += w.bits) {
    index |= CodeAt(w, n, k) << shift;
    n = n < 32 ? n + (w.tiles - 1) * 32 : n - 32;
  }
  return w.table[index & ((1 << w.window) - 1)];
}

int LevelBits(const Weight& w) { return w.table ? kTableLevelBits : w.bits; }

double ScaleAt(const Weight& w, int64_t n, int64_t k) {
  return HalfToFloat(w.scales[(n / 32 * w.groups + k / 32 / w.group_blocks) * 32 + n % 32]);
}

double ZeroAt(const Weight& w, int64_t n, int64_t k) {
  const int64_t at = w.shared_zero ? 0 : (n / 32 * w.groups + k / 32 / w.group_blocks) * 32 + n % 32;
  return double(w.zeros[at]) / double(1 << (8 - LevelBits(w)));
}

double ValueAt(const Weight& w, int64_t n, int64_t k) {
  return w.gain * ScaleAt(w, n, k) * (LevelAt(w, n, k) - ZeroAt(w, n, k));
}

/// A row of x after the int8 round trip.
std::vector<float> RoundTrip(const float* x, int64_t depth, int64_t group_size) {
  std::vector<float> out(static_cast<size_t>(depth));
  const int64_t block = group_size < 128 ? group_size : 128;
  for (int64_t k = 0; k < depth; k += block) {
    const int64_t end = k + block < depth ? k + block : depth;
    float top = 0;
    for (int64_t i = k; i < end; ++i) top = std::fmax(top, std::fabs(x[i]));
    const float scale = top / 127.0f;
    const float inverse = top > 0 ? 127.0f / top : 0.0f;
    for (int64_t i = k; i < end; ++i) out[size_t(i)] = std::nearbyint(x[i] * inverse) * scale;
  }
  return out;
}

struct Case {
  int bits;
  int window;  // 0: codes are levels
  int64_t outputs, depth, group_size;
  bool shared_zero;
};

void Run(const KernelTable& kernels, const Case& c) {
  Random random{uint64_t(c.bits * 7919 + c.outputs * 31 + c.depth)};
  Weight w{};
  w.bits = c.bits;
  w.gain = 0.5f;
  w.outputs = c.outputs;
  w.depth = c.depth;
  w.tiles = (c.outputs + 31) / 32;
  w.blocks = (c.depth + 31) / 32;
  w.group_blocks = c.group_size / 32;
  w.groups = (w.blocks + w.group_blocks - 1) / w.group_blocks;
  w.shared_zero = c.shared_zero;
  uint8_t table[kTableEntries];
  for (int i = 0; i < kTableEntries; ++i)
    table[i] = i < 1 << c.window ? uint8_t(random.Next() % 128) : table[i - (1 << c.window)];
  w.window = c.window;
  w.table = c.window > 0 ? table : nullptr;
  const std::vector<Segment> segments = MakeSegments(c.depth, c.group_size, &w.activation_depth);
  w.segments = segments.data();
  w.segment_count = int64_t(segments.size());

  const size_t packed_size = size_t(w.tiles * w.blocks * w.bits * kRowBytes);
  const size_t side_size = size_t(w.tiles * w.groups * 32);
  const auto packed = std::make_unique<uint8_t[]>(packed_size);
  const auto scales = std::make_unique<uint16_t[]>(side_size);
  const auto zeros = std::make_unique<uint8_t[]>(c.shared_zero ? 1 : side_size);
  const auto bias = std::make_unique<float[]>(size_t(c.outputs));
  // Padding holds rubbish here: nothing of it may reach an output that exists.
  for (size_t i = 0; i < packed_size; ++i) packed[i] = uint8_t(random.Next());
  for (size_t i = 0; i < side_size; ++i)
    scales[i] = uint16_t(0x2400 + random.Next() % 0x800);  // 2**-6 to 2**-4
  for (size_t i = 0; i < (c.shared_zero ? 1 : side_size); ++i) zeros[i] = uint8_t(random.Next());
  for (int64_t i = 0; i < c.outputs; ++i) bias[size_t(i)] = random.Float();
  w.packed = packed.get();
  w.scales = scales.get();
  w.zeros = zeros.get();
  w.bias = bias.get();

  const std::string name = std::string(kernels.isa) + " bits " + std::to_string(c.bits) + " window " +
                           std::to_string(c.window) + " N " + std::to_string(c.outputs) + " K " +
                           std::to_string(c.depth) + " group " + std::to_string(c.group_size) +
                           (c.shared_zero ? " shared" : " own") + " zero";
  std::vector<double> values(size_t(c.outputs * c.depth)), bounds(values.size());
  std::vector<float> row(size_t(c.depth), 0.0f);
  for (int64_t n = 0; n < c.outputs; ++n) {
    if (!w.table) DecodeRow(w, n, row.data());
    for (int64_t k = 0; k < c.depth; ++k) {
      const double value = ValueAt(w, n, k);
      values[size_t(n * c.depth + k)] = value;
      bounds[size_t(n * c.depth + k)] =
          std::fabs(value) + w.gain * ScaleAt(w, n, k) * double(1 << LevelBits(w));
      if (w.table) continue;
      Check(std::fabs(row[size_t(k)] - value) <= 1e-6 * std::fabs(value), "decode " + name);
    }
  }
  const Parallel parallel{RunInTurn, nullptr};
  for (const int64_t rows : {0, 1, 2, 5, 17, 40}) {
    const auto x = std::make_unique<float[]>(size_t(rows * c.depth));
    for (int64_t i = 0; i < rows * c.depth; ++i) x[size_t(i)] = random.Float();
    for (const Activations activations : {Activations::kFloat32, Activations::kInt8}) {
      const bool int8 = activations == Activations::kInt8;
      const double tolerance = int8 ? kInt8Tolerance : kFloatTolerance;
      const auto y = std::make_unique<float[]>(size_t(rows * c.outputs));
      Check(MatMul(kernels, w, activations, x.get(), rows, y.get(), parallel), "refused " + name);
      for (int64_t m = 0; m < rows; ++m) {
        std::vector<float> used(x.get() + m * c.depth, x.get() + (m + 1) * c.depth);
        if (int8) used = RoundTrip(used.data(), c.depth, c.group_size);
        for (int64_t n = 0; n < c.outputs; ++n) {
          double expected = bias[size_t(n)];
          double bound = 1.0;
          for (int64_t k = 0; k < c.depth; ++k) {
            expected += double(used[size_t(k)]) * values[size_t(n * c.depth + k)];
            bound += std::fabs(double(used[size_t(k)])) * bounds[size_t(n * c.depth + k)];
          }
          Check(std::fabs(y[size_t(m * c.outputs + n)] - expected) <= tolerance * bound,
                (int8 ? "int8 " : "float ") + name + " rows " + std::to_string(rows));
        }
      }
    }
  }
}

/// The largest codes against the largest activations: an int16 sum that could overflow does so here.
void RunExtremes(const KernelTable& kernels) {
  const std::vector<uint8_t> table(kTableEntries, 127);
  for (int format = 1; format <= 9; ++format) {
    constexpr int64_t kDepth = 256;
    const int bits = format <= 8 ? format : 2;
    Weight w{};
    w.bits = bits;
    w.window = 4;
    w.table = format <= 8 ? nullptr : table.data();
    w.gain = 1.0f;
    w.outputs = 32;
    w.depth = kDepth;
    w.tiles = 1;
    w.blocks = kDepth / 32;
    w.group_blocks = w.blocks;
    w.groups = 1;
    w.shared_zero = w.shared_bias = true;
    const std::vector<Segment> segments = MakeSegments(kDepth, kDepth, &w.activation_depth);
    w.segments = segments.data();
    w.segment_count = int64_t(segments.size());
    const std::vector<uint8_t> packed(size_t(w.blocks * bits * kRowBytes), 0xff);
    const std::vector<uint16_t> scales(32, 0x3c00);  // 1.0
    const uint8_t zero = 0;
    const float bias = 0.0f;
    w.packed = packed.data();
    w.scales = scales.data();
    w.zeros = &zero;
    w.bias = &bias;
    for (const float sign : {1.0f, -1.0f}) {
      for (const int64_t rows : {1, 2, 13}) {
        const std::vector<float> x(size_t(rows * kDepth), sign * 127.0f);
        std::vector<float> y(size_t(rows * 32));
        MatMul(kernels, w, Activations::kInt8, x.data(), rows, y.data(), {RunInTurn, nullptr});
        const float expected = sign * 127.0f * float((1 << LevelBits(w)) - 1) * float(kDepth);
        for (const float value : y)
          Check(value == expected,
                "extremes " + std::string(kernels.isa) + " format " + std::to_string(format));
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const KernelTable* kernels = Find(argc > 1 ? argv[1] : "best");
  if (!kernels) return kSkipped;
  struct Shape {
    int64_t outputs, depth;
  };
  for (int bits = 1; bits <= 8; ++bits) {
    for (const auto [outputs, depth] :
         {Shape{32, 64}, Shape{1, 1}, Shape{45, 200}, Shape{64, 33}, Shape{33, 545}}) {
      const int64_t whole = (depth + 31) / 32 * 32;
      for (const int64_t group_size : {int64_t{32}, int64_t{64}, int64_t{128}, int64_t{160}, whole})
        for (const bool shared : {true, false}) Run(*kernels, {bits, 0, outputs, depth, group_size, shared});
    }
  }
  for (int bits = 1; bits <= kMaxCodebookBits; ++bits) {
    for (int window = bits; window <= kMaxWindow; ++window) {
      for (const auto [outputs, depth] : {Shape{20, 33}, Shape{33, 160}, Shape{200, 96}}) {
        const int64_t whole = (depth + 31) / 32 * 32;
        for (const int64_t group_size : {int64_t{32}, int64_t{64}, whole})
          for (const bool shared : {true, false})
            Run(*kernels, {bits, window, outputs, depth, group_size, shared});
      }
    }
  }
  RunExtremes(*kernels);
  return Report(*kernels);
}
