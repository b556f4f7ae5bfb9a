// Products and look-ups of binary codes of every ISA against the sum of scaled signs, over planes, ragged
// shapes, groups, offsets, orders and row counts. Buffers are exactly as long as the shapes say, so that a
// sanitizer build sees any access beyond them.

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "kernels/binary.h"
#include "kernels/half.h"
#include "tests/harness.h"

namespace {

using namespace onnxq::kernels;
using namespace onnxq::tests;

// Largest error over sum |x| (sum of a row's scales) + |bias|: float32 sums in any order.
constexpr double kFloatTolerance = 1e-6;
// Half a step of a table whose largest entry is 127 steps.
constexpr double kHalfStep = 0.5 / 127;

struct Case {
  std::vector<int64_t> plane_rows;
  int64_t depth, group_size;
  bool offsets, ordered, shared_bias;
};

/// A weight, the memory that it borrows, and its values.
struct Owned {
  BinaryWeight weight{};
  std::unique_ptr<uint8_t[]> codes[kMaxPlanes];
  std::unique_ptr<uint16_t[]> scales[kMaxPlanes];
  std::unique_ptr<uint16_t[]> offsets;
  std::unique_ptr<int32_t[]> rank;
  std::unique_ptr<float[]> bias;
  std::vector<double> values;  // [outputs, depth], in the order of outputs
  std::vector<double> reach;   // [outputs, depth]: the sum of the scales, which bounds a value
};

template <class T, class F>
std::unique_ptr<T[]> Filled(int64_t count, const F& value) {
  auto values = std::make_unique<T[]>(size_t(count));
  for (int64_t i = 0; i < count; ++i) values[size_t(i)] = value();
  return values;
}

void FillValues(Owned& owned) {
  const BinaryWeight& w = owned.weight;
  for (int64_t n = 0; n < w.outputs; ++n) {
    const int64_t row = w.rank ? w.rank[n] : n;
    const int64_t tile = row / kBinaryTile, lane = row % kBinaryTile;
    for (int64_t k = 0; k < w.depth; ++k) {
      const int64_t side = (tile * w.groups + k / w.group_depth) * kBinaryTile + lane;
      double value = w.offsets ? HalfToFloat(w.offsets[side]) : 0.0;
      double reach = std::fabs(value);
      for (int p = 0; p < w.plane_count && row < w.planes[p].rows; ++p) {
        const double scale = HalfToFloat(w.planes[p].scales[side]);
        const uint8_t keys = w.planes[p].codes[(tile * w.chunks + k / kChunkDepth) * kBinaryHalf + lane % 32];
        value += keys >> (lane / 32 * 4 + k % 4) & 1 ? scale : -scale;
        reach += std::fabs(scale);
      }
      owned.values.push_back(value * w.gain);
      owned.reach.push_back(reach * std::fabs(w.gain));
    }
  }
}

Owned RandomWeight(Random& random, const Case& c) {
  Owned owned;
  BinaryWeight& w = owned.weight;
  w.gain = 0.5f;
  w.outputs = c.plane_rows[0];
  w.depth = c.depth;
  w.tiles = (w.outputs + kBinaryTile - 1) / kBinaryTile;
  w.chunks = (c.depth + kBlockDepth - 1) / kBlockDepth * 8;
  w.group_depth = std::min(c.group_size, w.chunks * kChunkDepth);
  w.groups = (c.depth + w.group_depth - 1) / w.group_depth;
  w.group_tables = (w.group_depth + kTableDepth - 1) / kTableDepth;
  w.shared_bias = c.shared_bias;
  const auto half = [&] { return uint16_t(0x2800 + random.Next() % 0x1400 + (random.Next() % 2 << 15)); };
  w.plane_count = int(c.plane_rows.size());
  for (int p = 0; p < w.plane_count; ++p) {
    BinaryPlane& plane = w.planes[p];
    plane.rows = c.plane_rows[size_t(p)];
    const int64_t tiles = (plane.rows + kBinaryTile - 1) / kBinaryTile;
    // Whatever lies behind the last row and the last input must not count.
    owned.codes[p] = Filled<uint8_t>(tiles * w.chunks * kBinaryHalf, [&] { return uint8_t(random.Next()); });
    owned.scales[p] = Filled<uint16_t>(tiles * w.groups * kBinaryTile, half);
    for (int64_t group = 0; group < w.groups; ++group)
      for (int64_t row = plane.rows; row < tiles * kBinaryTile; ++row)
        owned.scales[p][size_t(((tiles - 1) * w.groups + group) * kBinaryTile + row % kBinaryTile)] = 0x7e00;
    plane.codes = owned.codes[p].get();
    plane.scales = owned.scales[p].get();
  }
  if (c.offsets) {
    owned.offsets = Filled<uint16_t>(w.tiles * w.groups * kBinaryTile, half);
    w.offsets = owned.offsets.get();
  }
  if (c.ordered) {
    owned.rank = std::make_unique<int32_t[]>(size_t(w.outputs));
    std::iota(owned.rank.get(), owned.rank.get() + w.outputs, 0);
    for (int64_t n = w.outputs - 1; n > 0; --n)
      std::swap(owned.rank[size_t(n)], owned.rank[random.Next() % size_t(n + 1)]);
    w.rank = owned.rank.get();
  }
  owned.bias = Filled<float>(c.shared_bias ? 1 : w.outputs, [&] { return random.Float(); });
  w.bias = owned.bias.get();
  FillValues(owned);
  return owned;
}

/// The kernels of this table's ISA, of which the library does not know the emulated one.
const BinaryKernels& Ours(const KernelTable& kernels) {
  return &kernels == &kAvx512VnniEmulated ? kAvx512VnniEmulatedBinary : BinaryKernelsOf(kernels);
}

/// By how much int8 tables may be wrong: half a step of each chunk, for each plane.
double TableError(const BinaryWeight& w, const double* reach, const float* x) {
  double error = 0.0;
  for (int64_t group = 0; group < w.groups; ++group) {
    const int64_t end = std::min((group + 1) * w.group_depth, w.depth);
    for (int64_t begin = group * w.group_depth; begin < end; begin += kTableDepth) {
      double largest = 0.0;
      int64_t chunks = 0;
      for (int64_t k = begin; k < std::min(begin + kTableDepth, end); k += kChunkDepth, ++chunks) {
        double sum = 0.0;
        for (int64_t i = k; i < std::min(k + kChunkDepth, end); ++i) sum += std::fabs(x[i]);
        largest = std::max(largest, sum);
      }
      error += kHalfStep * largest * double(chunks) * reach[begin];
    }
  }
  return error;
}

std::string NameOf(const KernelTable& kernels, const Case& c) {
  std::string name = std::string(kernels.isa) + " planes";
  for (const int64_t rows : c.plane_rows) name += ' ' + std::to_string(rows);
  return name + " K " + std::to_string(c.depth) + " group " + std::to_string(c.group_size) +
         (c.offsets ? " offsets" : "") + (c.ordered ? " ordered" : "");
}

void RunDecode(const Owned& owned, const std::string& name) {
  const BinaryWeight& w = owned.weight;
  const auto row = std::make_unique<float[]>(size_t(w.depth));
  for (int64_t n = 0; n < w.outputs; ++n) {
    DecodeBinaryRow(w, n, row.get());
    for (int64_t k = 0; k < w.depth; ++k) {
      const size_t at = size_t(n * w.depth + k);
      Check(std::fabs(row[size_t(k)] - owned.values[at]) <= kFloatTolerance * owned.reach[at],
            "row of " + name);
    }
  }
}

void RunProduct(const KernelTable& kernels, const Case& c) {
  Random random{uint64_t(c.plane_rows[0] * 31 + c.depth * 7 + c.group_size)};
  const Owned owned = RandomWeight(random, c);
  const BinaryWeight& w = owned.weight;
  const std::string name = NameOf(kernels, c);
  RunDecode(owned, name);
  for (const Activations activations : {Activations::kInt8, Activations::kFloat32})
    for (const int64_t rows : {0, 1, 2, 3, 4, 5, 7, 33}) {
      const auto x = Filled<float>(rows * c.depth, [&] { return random.Float(); });
      // What lay there before must not count.
      const auto y = Filled<float>(rows * w.outputs, [] { return 1e9f; });
      Check(MatMulBinary(Ours(kernels), w, activations, x.get(), rows, y.get(), {RunInTurn, nullptr}),
            "refused " + name);
      for (int64_t m = 0; m < rows; ++m)
        for (int64_t n = 0; n < w.outputs; ++n) {
          const float* row = x.get() + m * c.depth;
          const double* reach = owned.reach.data() + n * c.depth;
          double expected = w.bias[w.shared_bias ? 0 : n];
          double bound = std::fabs(expected);
          for (int64_t k = 0; k < c.depth; ++k) {
            expected += double(row[k]) * owned.values[size_t(n * c.depth + k)];
            bound += std::fabs(double(row[k])) * reach[k];
          }
          bound *= kFloatTolerance;
          if (activations == Activations::kInt8) bound += 1.001 * TableError(w, reach, row);
          Check(std::fabs(y[size_t(m * w.outputs + n)] - expected) <= bound,
                name + (activations == Activations::kInt8 ? " int8" : " float") + " rows " +
                    std::to_string(rows));
        }
    }
}

/// Whole numbers of which the largest sum of a table is 127, so that its bytes are exact.
void RunExactTables(const KernelTable& kernels) {
  Random random{11};
  const Owned owned = RandomWeight(random, {{192, 192, 64}, 1024, 1024, false, false, true});
  for (const float unit : {1.0f, 0.25f}) {
    std::vector<float> x(1024), y(192);
    for (size_t k = 0; k < x.size(); ++k)
      x[k] = unit * (k % kTableDepth >= kChunkDepth ? float(random.Next() % 63) - 31
                     : k % kTableDepth == 0         ? 127
                                                    : 0);
    MatMulBinary(Ours(kernels), owned.weight, Activations::kInt8, x.data(), 1, y.data(),
                 {RunInTurn, nullptr});
    for (size_t n = 0; n < y.size(); ++n) {
      double expected = owned.weight.bias[0], bound = 0.0;
      for (size_t k = 0; k < x.size(); ++k) {
        expected += x[k] * owned.values[n * 1024 + k];
        bound += std::fabs(x[k]) * owned.reach[n * 1024 + k];
      }
      Check(std::fabs(y[n] - expected) <= kFloatTolerance * bound,
            std::string(kernels.isa) + " exact tables");
    }
  }
}

void RunHardInputs(const KernelTable& kernels) {
  Random random{7};
  const Owned owned = RandomWeight(random, {{70, 5}, 100, 64, false, false, true});
  for (const float bad : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()})
    for (const Activations activations : {Activations::kInt8, Activations::kFloat32})
      for (const int64_t rows : {2, 12}) {
        std::vector<float> x(size_t(rows * 100), 1.0f), y(size_t(rows * 70));
        x[199] = bad;
        MatMulBinary(Ours(kernels), owned.weight, activations, x.data(), rows, y.data(),
                     {RunInTurn, nullptr});
        for (size_t i = 0; i < y.size(); ++i)
          Check(std::isfinite(y[i]) == (i / 70 != 1), std::string(kernels.isa) + " not a number");
      }
  for (const float tiny : {0.0f, 1e-38f, 1e-44f}) {
    std::vector<float> x(100, tiny), y(70);
    MatMulBinary(Ours(kernels), owned.weight, Activations::kInt8, x.data(), 1, y.data(),
                 {RunInTurn, nullptr});
    for (const float value : y)
      Check(std::fabs(value - owned.weight.bias[0]) < 1e-30f, std::string(kernels.isa) + " tiny inputs");
  }
}

bool RefuseToRun(void*, Parallel::Task, size_t, void*) { return false; }

void RunRefusingPool(const KernelTable& kernels) {
  Random random{3};
  const Owned owned = RandomWeight(random, {{512, 512}, 512, 512, false, true, false});
  const auto x = Filled<float>(512 * 512, [&] { return random.Float(); });
  std::vector<float> y(512 * 512);
  for (const Activations activations : {Activations::kInt8, Activations::kFloat32})
    Check(!MatMulBinary(Ours(kernels), owned.weight, activations, x.get(), 512, y.data(),
                        {RefuseToRun, nullptr}),
          "a refusal is not noticed");
}

}  // namespace

int main(int argc, char** argv) {
  const KernelTable* kernels = Find(argc > 1 ? argv[1] : "best");
  if (!kernels) return kSkipped;
  for (const Case& c : {
           Case{{1}, 1, 32, false, false, true},
           Case{{1, 1, 1, 1, 1, 1}, 33, 64, true, true, true},
           Case{{3, 1, 1}, 100, 32, false, true, false},
           Case{{31, 31}, 31, 32, true, false, false},
           Case{{33, 32, 32, 1}, 300, 96, false, false, false},
           Case{{64, 64, 64}, 256, 256, false, false, false},
           Case{{65, 64}, 1100, 1120, true, true, false},
           Case{{150, 101, 64, 63, 2}, 200, 64, true, true, false},
           Case{{200, 129, 128, 127, 65, 64}, 97, 128, false, true, true},
           Case{{128, 70, 70, 70}, 640, 1 << 20, false, false, true},
           Case{{193, 193}, 545, 160, true, false, true},
       })
    RunProduct(*kernels, c);
  RunExactTables(*kernels);
  RunHardInputs(*kernels);
  RunRefusingPool(*kernels);
  return Report(*kernels);
}
