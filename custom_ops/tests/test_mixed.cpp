// Mixed-depth products of every ISA against a literal reading of the format, over bands, ragged shapes,
// depths and row counts. Buffers are exactly as long as the shapes say, so that a sanitizer build sees any
// access beyond them.

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "kernels/half.h"
#include "kernels/mixed.h"
#include "tests/harness.h"

namespace {

using namespace onnxq::kernels;
using namespace onnxq::tests;

// Largest error over sum |x| * scales * 2**7 (2**8 for 8 bits): float32 sums in any order. The int8 round
// trip is reproduced exactly, so the same holds for it.
constexpr double kTolerance = 1e-6;
// Rows taken to be many: more than one task's or register block's.
constexpr int64_t kRowCounts[] = {0, 1, 2, 7, 33};

int64_t Up(int64_t a, int64_t b) { return (a + b - 1) / b; }

enum class Depths { kAll, kNone, kSomeBandsNone, kEight, kThree };

struct Case {
  int64_t outputs, depth, band;
  Depths depths;
  bool shared_bias;
};

/// One weight as the format's text has it: codes of all outputs and stored inputs, tiles and blocks filled
/// up.
struct Text {
  int64_t tiles, blocks, bands, band_tiles;
  std::vector<uint8_t> depths, codes, columns;
  std::vector<uint16_t> scales, order;
  std::vector<uint8_t> tables;  // [kTableDepths, kTableEntries]
  float steps[kMaxDepth + 1];
  float gain;

  int DepthAt(int64_t n, int64_t p) const { return depths[size_t(n / 32 / band_tiles * blocks + p / 32)]; }
  uint8_t& CodeAt(int64_t n, int64_t p) { return codes[size_t(n * blocks * 32 + p)]; }

  /// The level above the zero point.
  double LevelAt(int64_t n, int64_t p) {
    const int depth = DepthAt(n, p);
    if (depth > kTableDepths) return CodeAt(n, p) - (depth == 8 ? 128.0 : 63.5);
    const int window = depth < 4 ? 4 : depth;
    const int64_t first = n / 32 / band_tiles * band_tiles * 32;
    const int64_t height = std::min(band_tiles * 32, tiles * 32 - first);
    int index = 0;
    for (int shift = 0; shift < window; shift += depth) {
      index |= CodeAt(n, p) << shift;
      n = first + (n - first + height - 32) % height;
    }
    return tables[size_t((depth - 1) * kTableEntries + (index & ((1 << window) - 1)))] - 63.5;
  }
};

/// The bytes of the layout's text: for each depth, tile, block of that depth: planes, widest first.
std::unique_ptr<uint8_t[]> Pack(Text& t, int64_t* bytes) {
  std::vector<uint8_t> packed;
  for (int depth = 1; depth <= kMaxDepth; ++depth)
    for (int64_t tile = 0; tile < t.tiles; ++tile)
      for (int64_t block = 0; block < t.blocks; ++block) {
        if (t.DepthAt(tile * 32, block * 32) != depth) continue;
        const size_t start = packed.size();
        packed.resize(start + size_t(depth) * kRowBytes);
        for (int64_t n = 0; n < 32; ++n)
          for (int64_t j = 0; j < 32; ++j) {
            const int64_t quad = j / 4;
            int row = 0, low = 0;
            for (int width = 8; width > 0; width /= 2) {
              if (!(depth & width)) continue;
              const int fields = 8 / width;
              const int part = t.CodeAt(tile * 32 + n, block * 32 + j) >> low & ((1 << width) - 1);
              packed[start + size_t(((row + quad / fields) * 32 + n) * 4 + j % 4)] |=
                  uint8_t(part << quad % fields * width);
              row += width;
              low += width;
            }
          }
      }
  *bytes = int64_t(packed.size());
  auto exact = std::make_unique<uint8_t[]>(packed.size());
  std::copy(packed.begin(), packed.end(), exact.get());
  return exact;
}

Text RandomText(Random& random, const Case& c) {
  Text t{};
  t.tiles = Up(c.outputs, 32);
  t.blocks = Up(c.depth, 32);
  t.band_tiles = std::min(c.band / 32, t.tiles);
  t.bands = Up(t.tiles, t.band_tiles);
  t.gain = 0.5f;
  for (int64_t m = 0; m < t.bands; ++m)
    for (int64_t b = 0; b < t.blocks; ++b) {
      const int any = t.blocks >= 9 && b < 9 ? int((b + m) % 9) : int(random.Next() % 9);
      const bool none = c.depths == Depths::kNone || (c.depths == Depths::kSomeBandsNone && m % 2 == 0);
      t.depths.push_back(uint8_t(none                         ? 0
                                 : c.depths == Depths::kEight ? 8
                                 : c.depths == Depths::kThree ? 3
                                                              : any));
    }
  for (int64_t n = 0; n < t.tiles * 32; ++n)
    for (int64_t p = 0; p < t.blocks * 32; ++p)
      t.codes.push_back(uint8_t(random.Next() & ((1u << t.DepthAt(n, p)) - 1)));
  for (int64_t i = 0; i < t.bands * t.blocks * 32; ++i)
    t.columns.push_back(uint8_t(random.Next() % (i % 3 == 0 ? 256 : 32)));
  for (int64_t i = 0; i < t.tiles * 32; ++i)
    t.scales.push_back(uint16_t(0x2400 + random.Next() % 0x800));  // 2**-6 to 2**-4
  for (int64_t k = 0; k < c.depth; ++k) t.order.push_back(uint16_t(k));
  for (int64_t k = c.depth; k-- > 1;) std::swap(t.order[size_t(k)], t.order[random.Next() % size_t(k + 1)]);
  for (int bits = 1; bits <= kTableDepths; ++bits) {
    const int entries = bits < 4 ? 16 : 1 << bits;
    for (int i = 0; i < kTableEntries; ++i)
      t.tables.push_back(i < entries ? uint8_t(random.Next() % 128)
                                     : t.tables[t.tables.size() - size_t(entries)]);
  }
  for (float& step : t.steps) step = 0.01f + float(random.Next() % 1000) / 4000.0f;
  return t;
}

/// The stored inputs that band `m` multiplies, [blocks * 32], after the int8 round trip where asked for.
std::vector<float> Ready(const Text& t, const float* x, int64_t depth, int64_t m, bool int8) {
  std::vector<float> ready(size_t(t.blocks * 32), 0.0f);
  for (int64_t p = 0; p < depth; ++p) {
    const float column = float(std::exp2(-double(t.columns[size_t(m * t.blocks * 32 + p)]) / 8.0));
    const float step = t.steps[t.depths[size_t(m * t.blocks + p / 32)]];
    ready[size_t(p)] = x[t.order[size_t(p)]] * column * step;
  }
  if (!int8) return ready;
  for (int bits = 1; bits <= kMaxDepth; ++bits) {
    std::vector<size_t> run;
    for (int64_t p = 0; p < t.blocks * 32; ++p)
      if (t.depths[size_t(m * t.blocks + p / 32)] == bits) run.push_back(size_t(p));
    for (size_t from = 0; from < run.size(); from += 128) {
      const size_t to = std::min(from + 128, run.size());
      float top = 0;
      for (size_t i = from; i < to; ++i) top = std::fmax(top, std::fabs(ready[run[i]]));
      const float inverse = top > 0 ? 127.0f / top : 0.0f;
      for (size_t i = from; i < to; ++i)
        ready[run[i]] = std::nearbyint(ready[run[i]] * inverse) * (top / 127.0f);
    }
  }
  return ready;
}

template <class T>
std::unique_ptr<T[]> Exact(const std::vector<T>& values) {
  auto exact = std::make_unique<T[]>(values.size());
  std::copy(values.begin(), values.end(), exact.get());
  return exact;
}

void Run(const KernelTable& kernels, const Case& c) {
  Random random{uint64_t(c.outputs * 31 + c.depth * 7 + c.band)};
  const std::string name = std::string(kernels.isa) + " N " + std::to_string(c.outputs) + " K " +
                           std::to_string(c.depth) + " band " + std::to_string(c.band) + " depths " +
                           std::to_string(int(c.depths));
  Text t = RandomText(random, c);
  int64_t bytes = 0;
  const auto packed = Pack(t, &bytes);
  const auto depths = Exact(t.depths);
  const MixedLayout layout(c.outputs, c.depth, c.band, depths.get());
  Check(layout.packed_bytes == bytes, "packed bytes of " + name);
  Check(layout.bands == t.bands, "bands of " + name);
  const auto columns = Exact(t.columns);
  const auto scales = Exact(t.scales);
  const auto order = Exact(t.order);
  const auto tables = Exact(t.tables);
  const auto bias = std::make_unique<float[]>(size_t(c.shared_bias ? 1 : c.outputs));
  for (int64_t i = 0; i < (c.shared_bias ? 1 : c.outputs); ++i) bias[size_t(i)] = random.Float();
  const MixedWeight weight{layout,       packed.get(), columns.get(), scales.get(),  order.get(),
                           tables.get(), t.steps,      bias.get(),    c.shared_bias, t.gain};
  std::vector<double> levels(size_t(c.outputs * c.depth));
  for (int64_t n = 0; n < c.outputs; ++n)
    for (int64_t p = 0; p < c.depth; ++p)
      levels[size_t(n * c.depth + p)] = t.DepthAt(n, p) == 0 ? 0.0 : t.LevelAt(n, p);
  for (const int64_t rows : kRowCounts) {
    const auto x = std::make_unique<float[]>(size_t(rows * c.depth));
    for (int64_t i = 0; i < rows * c.depth; ++i) x[size_t(i)] = random.Float();
    for (const Activations activations : {Activations::kFloat32, Activations::kInt8}) {
      const bool int8 = activations == Activations::kInt8;
      const auto y = std::make_unique<float[]>(size_t(rows * c.outputs));
      std::fill_n(y.get(), rows * c.outputs, 1e9f);  // what lies there before must not count
      Check(MatMulMixed(kernels, weight, activations, x.get(), rows, y.get(), {RunInTurn, nullptr}),
            "refused " + name);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t m = 0; m < t.bands; ++m) {
          const std::vector<float> used = Ready(t, x.get() + r * c.depth, c.depth, m, int8);
          const int64_t first = m * t.band_tiles * 32;
          for (int64_t n = first; n < std::min(first + t.band_tiles * 32, c.outputs); ++n) {
            const double scale = t.gain * HalfToFloat(t.scales[size_t(n)]);
            double expected = bias[size_t(c.shared_bias ? 0 : n)];
            double bound = 1.0;
            for (int64_t p = 0; p < c.depth; ++p) {
              const int depth = t.DepthAt(n, p);
              expected += double(used[size_t(p)]) * scale * levels[size_t(n * c.depth + p)];
              bound += std::fabs(double(used[size_t(p)])) * scale * (depth == 0 ? 0 : depth == 8 ? 256 : 128);
            }
            Check(std::fabs(y[size_t(r * c.outputs + n)] - expected) <= kTolerance * bound,
                  (int8 ? "int8 " : "float ") + name + " rows " + std::to_string(rows));
          }
        }
    }
  }
}

bool RefuseToRun(void*, Parallel::Task, size_t, void*) { return false; }

/// More rows and bands than are made ready together, against the same rows one by one; and a pool that
/// refuses.
void RunInParts(const KernelTable& kernels) {
  Random random{7};
  const Case c{256, 8192, 32, Depths::kAll, false};
  Text t = RandomText(random, c);
  int64_t bytes = 0;
  const auto packed = Pack(t, &bytes);
  const MixedLayout layout(c.outputs, c.depth, c.band, t.depths.data());
  const std::vector<float> bias(size_t(c.outputs), 0.25f);
  const MixedWeight weight{layout,          packed.get(), t.columns.data(), t.scales.data(), t.order.data(),
                           t.tables.data(), t.steps,      bias.data(),      false,           t.gain};
  constexpr int64_t kRows = 400;
  std::vector<float> x(size_t(kRows * c.depth));
  for (float& value : x) value = random.Float();
  for (const Activations activations : {Activations::kFloat32, Activations::kInt8}) {
    std::vector<float> y(size_t(kRows * c.outputs));
    Check(MatMulMixed(kernels, weight, activations, x.data(), kRows, y.data(), {RunInTurn, nullptr}),
          "refused many rows");
    for (const int64_t row : {int64_t{0}, int64_t{199}, kRows - 1}) {
      std::vector<float> one(size_t(c.outputs));
      MatMulMixed(kernels, weight, activations, x.data() + row * c.depth, 1, one.data(),
                  {RunInTurn, nullptr});
      for (int64_t n = 0; n < c.outputs; ++n)
        Check(std::fabs(one[size_t(n)] - y[size_t(row * c.outputs + n)]) <= 1e-3, "rows in parts");
    }
    Check(!MatMulMixed(kernels, weight, activations, x.data(), kRows, y.data(), {RefuseToRun, nullptr}),
          "a pool that refuses is not noticed");
  }
}

}  // namespace

int main(int argc, char** argv) {
  const KernelTable* kernels = Find(argc > 1 ? argv[1] : "best");
  if (!kernels) return kSkipped;
  for (const Case& c : {
           Case{1, 1, 32, Depths::kThree, true},
           Case{32, 32, 32, Depths::kAll, false},
           Case{45, 300, 64, Depths::kAll, true},
           Case{100, 300, 32, Depths::kAll, false},
           Case{100, 777, 1 << 20, Depths::kAll, false},
           Case{200, 545, 96, Depths::kAll, false},
           Case{150, 333, 64, Depths::kSomeBandsNone, false},
           Case{70, 90, 32, Depths::kNone, true},
           Case{70, 90, 64, Depths::kNone, false},
           Case{96, 700, 64, Depths::kEight, true},
           Case{96, 700, 64, Depths::kThree, true},
       })
    Run(*kernels, c);
  RunInParts(*kernels);
  return Report(*kernels);
}
