// Products, look-ups and rounding of 8-bit floats of every ISA against the formula of a value, over kinds,
// ragged shapes, groups and row counts. Buffers are exactly as long as the shapes say, so that a sanitizer
// build sees any access beyond them.

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "kernels/float8.h"
#include "kernels/half.h"
#include "tests/harness.h"

namespace {

using namespace onnxq::kernels;
using namespace onnxq::tests;

// Largest error over sum |x W| + |bias|: float32 sums in any order.
constexpr double kTolerance = 1e-6;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

/// The value of a code, as the formula reads.
double ValueOf(const Float8Kind& kind, int code) {
  const int exponent = (code & 0x7f) >> kind.mantissa_bits;
  const double fraction = std::ldexp(code & ((1 << kind.mantissa_bits) - 1), -kind.mantissa_bits);
  const double magnitude = exponent > 0 ? std::ldexp(1.0 + fraction, exponent - kind.exponent_bias)
                                        : std::ldexp(fraction, 1 - kind.exponent_bias);
  return code & 0x80 ? -magnitude : magnitude;
}

std::unique_ptr<float[]> Floats(Random& random, int64_t count) {
  auto values = std::make_unique<float[]>(size_t(count));
  for (int64_t i = 0; i < count; ++i) values[size_t(i)] = random.Float();
  return values;
}

/// A weight, and the memory that it borrows.
struct Owned {
  Float8Weight weight{};
  std::unique_ptr<uint8_t[]> codes;
  std::unique_ptr<uint16_t[]> scales;
  std::unique_ptr<float[]> bias;
};

struct Case {
  int64_t outputs, depth, group_size;
  bool shared_scale, shared_bias;
};

Owned RandomWeight(Random& random, const Float8Kind& kind, const Case& c) {
  Owned owned;
  Float8Weight& w = owned.weight;
  w.gain = 0.5f;
  w.outputs = c.outputs;
  w.depth = c.depth;
  w.mantissa_bits = kind.mantissa_bits;
  w.unit = Float8Unit(kind);
  w.group_depth = std::min(c.group_size, c.depth);
  w.groups = (c.depth + w.group_depth - 1) / w.group_depth;
  w.shared_scale = c.shared_scale;
  w.shared_bias = c.shared_bias;
  const int64_t scales = c.shared_scale ? 1 : c.outputs * w.groups;
  owned.codes = std::make_unique<uint8_t[]>(size_t(c.outputs * c.depth));
  owned.scales = std::make_unique<uint16_t[]>(size_t(scales));
  for (int64_t i = 0; i < c.outputs * c.depth; ++i) owned.codes[size_t(i)] = uint8_t(random.Next());
  // 2**-6 to 2**-4, and subnormal ones.
  for (int64_t i = 0; i < scales; ++i)
    owned.scales[size_t(i)] =
        uint16_t(i % 5 == 3 ? 1 + random.Next() % 1023 : 0x2400 + random.Next() % 0x800);
  owned.bias = Floats(random, c.shared_bias ? 1 : c.outputs);
  w.codes = owned.codes.get();
  w.scales = owned.scales.get();
  w.bias = owned.bias.get();
  return owned;
}

double WeightAt(const Float8Kind& kind, const Float8Weight& w, int64_t n, int64_t k) {
  const int64_t scale = w.shared_scale ? 0 : n * w.groups + k / w.group_depth;
  return double(w.gain) * HalfToFloat(w.scales[scale]) * ValueOf(kind, w.codes[n * w.depth + k]);
}

/// All codes are what the formula says, times scales of which one is a subnormal half.
void RunCodes(const KernelTable& kernels, const Float8Kind& kind) {
  for (const uint16_t scale : {0x3c00, 0x3a55, 0x0001}) {
    Float8Weight w{};
    w.gain = 0.25f;
    w.outputs = 1;
    w.depth = w.group_depth = 256;
    w.groups = 1;
    w.mantissa_bits = kind.mantissa_bits;
    w.unit = Float8Unit(kind);
    w.scales = &scale;
    std::vector<uint8_t> codes(256);
    for (int code = 0; code < 256; ++code) codes[size_t(code)] = uint8_t(code);
    w.codes = codes.data();
    std::vector<float> row(256);
    DecodeFloat8Row(kernels, w, 0, row.data());
    for (int code = 0; code < 256; ++code)
      Check(row[size_t(code)] == WeightAt(kind, w, 0, code),
            std::string(kernels.isa) + " " + kind.name + " code " + std::to_string(code));
  }
}

void RunProduct(const KernelTable& kernels, const Float8Kind& kind, const Case& c,
                const std::vector<int64_t>& row_counts) {
  Random random{uint64_t(c.outputs * 31 + c.depth * 7 + c.group_size)};
  const std::string name = std::string(kernels.isa) + " " + kind.name + " N " + std::to_string(c.outputs) +
                           " K " + std::to_string(c.depth) + " group " + std::to_string(c.group_size);
  const Owned owned = RandomWeight(random, kind, c);
  const Float8Weight& w = owned.weight;
  std::vector<double> values(size_t(c.outputs * c.depth));
  const auto row = std::make_unique<float[]>(size_t(c.depth));
  for (int64_t n = 0; n < c.outputs; ++n) {
    DecodeFloat8Row(kernels, w, n, row.get());
    for (int64_t k = 0; k < c.depth; ++k) {
      values[size_t(n * c.depth + k)] = WeightAt(kind, w, n, k);
      Check(row[size_t(k)] == values[size_t(n * c.depth + k)], "row of " + name);
    }
  }
  for (const int64_t rows : row_counts) {
    const auto x = Floats(random, rows * c.depth);
    const auto y = std::make_unique<float[]>(size_t(rows * c.outputs));
    std::fill_n(y.get(), rows * c.outputs, 1e9f);  // what lies there before must not count
    Check(MatMulFloat8(kernels, w, x.get(), rows, y.get(), {RunInTurn, nullptr}), "refused " + name);
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t n = 0; n < c.outputs; ++n) {
        double expected = w.bias[w.shared_bias ? 0 : n];
        double bound = std::fabs(expected);
        for (int64_t k = 0; k < c.depth; ++k) {
          const double product = double(x[size_t(m * c.depth + k)]) * values[size_t(n * c.depth + k)];
          expected += product;
          bound += std::fabs(product);
        }
        Check(std::fabs(y[size_t(m * c.outputs + n)] - expected) <= kTolerance * bound,
              name + " rows " + std::to_string(rows));
      }
  }
}

/// Finite magnitudes of a kind: code by code, so that a tie goes to the even code.
std::vector<double> Magnitudes(const Float8Kind& kind) {
  std::vector<double> magnitudes;
  for (int code = 0; code < 128 && ValueOf(kind, code) <= kind.largest; ++code)
    magnitudes.push_back(ValueOf(kind, code));
  return magnitudes;
}

float Rounded(const std::vector<double>& magnitudes, float x, float scale) {
  const float ratio = x / scale;
  if (std::isnan(ratio)) return ratio;
  const double magnitude = std::min(std::fabs(double(ratio)), magnitudes.back());
  const size_t above =
      size_t(std::lower_bound(magnitudes.begin(), magnitudes.end(), magnitude) - magnitudes.begin());
  size_t code = above;
  if (above > 0) {
    const double up = magnitudes[above] - magnitude, down = magnitude - magnitudes[above - 1];
    if (down < up || (down == up && above % 2 == 1)) code = above - 1;
  }
  return std::copysign(float(magnitudes[code]), ratio) * scale;
}

void CheckRounded(float found, float expected, const std::string& name) {
  const bool same = std::isnan(expected)
                        ? std::isnan(found)
                        : std::bit_cast<uint32_t>(found) == std::bit_cast<uint32_t>(expected);
  Check(same, name + ": " + std::to_string(found) + ", expected " + std::to_string(expected));
}

void RunRound(const KernelTable& kernels, const Float8Kind& kind) {
  const std::vector<double> magnitudes = Magnitudes(kind);
  std::vector<float> inputs = {
      0.0f, kInfinity, kNaN, 1e-45f, 1e-38f, std::numeric_limits<float>::max(), 2.0f * kind.largest};
  for (size_t code = 0; code < magnitudes.size(); ++code) {
    const double next = code + 1 < magnitudes.size() ? magnitudes[code + 1] : 2.0 * magnitudes[code];
    for (const float at : {float(magnitudes[code]), float((magnitudes[code] + next) / 2)})
      for (const float near : {at, std::nextafter(at, kInfinity), std::nextafter(at, 0.0f)})
        inputs.push_back(near);
  }
  Random random{99};
  for (int i = 0; i < 20000; ++i) inputs.push_back(std::bit_cast<float>(random.Next() & 0x7fffffffu));
  for (int i = 0; i < 20000; ++i) inputs.push_back(std::ldexp(random.Float(), int(random.Next() % 40) - 22));
  const size_t positive = inputs.size();
  for (size_t i = 0; i < positive; ++i) inputs.push_back(-inputs[i]);
  const std::string name = std::string(kernels.isa) + " " + kind.name;
  const Parallel parallel{RunInTurn, nullptr};
  for (const float scale : {1.0f, 0.25f, 0.0123f, 321.7f, 1e-30f}) {
    // The whole, in several tasks, then each length up to a few vectors.
    std::vector<float> y(inputs.size());
    Check(RoundFloat8(kernels, kind, scale, inputs.data(), int64_t(inputs.size()), y.data(), parallel),
          "refused " + name);
    for (size_t i = 0; i < inputs.size(); ++i)
      CheckRounded(y[i], Rounded(magnitudes, inputs[i], scale), name + " of " + std::to_string(inputs[i]));
    for (int64_t count = 0; count <= 40; ++count) {
      const auto x = std::make_unique<float[]>(size_t(count));
      const auto part = std::make_unique<float[]>(size_t(count));
      std::copy_n(inputs.end() - count, count, x.get());
      RoundFloat8(kernels, kind, scale, x.get(), count, part.get(), parallel);
      for (int64_t i = 0; i < count; ++i)
        CheckRounded(part[size_t(i)], y[y.size() - size_t(count - i)], name + " in " + std::to_string(count));
    }
  }
}

void RunRoundRows(const KernelTable& kernels, const Float8Kind& kind) {
  const std::vector<double> magnitudes = Magnitudes(kind);
  Random random{5};
  for (const int64_t width : {1, 7, 32, 45, 1000, 40000}) {
    const int64_t rows = width < 40000 ? 70 : 3;
    const auto x = Floats(random, rows * width);
    std::fill_n(x.get(), width, 0.0f);
    for (int64_t i = 0; i < width; ++i) x[size_t(width + i)] *= 1e-42f;  // a scale that may round to zero
    x[size_t(2 * width)] = kNaN;
    const auto y = std::make_unique<float[]>(size_t(rows * width));
    const std::string name = std::string(kernels.isa) + " " + kind.name + " rows of " + std::to_string(width);
    Check(RoundFloat8Rows(kernels, kind, x.get(), rows, width, y.get(), {RunInTurn, nullptr}),
          "refused " + name);
    for (int64_t row = 0; row < rows; ++row) {
      float largest = 0.0f;
      for (int64_t i = 0; i < width; ++i) {
        const float magnitude = std::fabs(x[size_t(row * width + i)]);
        if (!(magnitude <= largest)) largest = magnitude;
        if (std::isnan(largest)) break;
      }
      float scale = largest / kind.largest;
      if (scale == 0.0f) scale = 1.0f;
      for (int64_t i = row * width; i < (row + 1) * width; ++i)
        CheckRounded(y[size_t(i)], Rounded(magnitudes, x[size_t(i)], scale),
                     name + " row " + std::to_string(row));
    }
  }
}

bool RefuseToRun(void*, Parallel::Task, size_t, void*) { return false; }

void RunRefusingPool(const KernelTable& kernels) {
  Random random{3};
  const Float8Kind& kind = kFloat8Kinds[0];
  const Owned owned = RandomWeight(random, kind, {512, 512, 512, false, false});
  const auto x = Floats(random, 512 * 512);
  std::vector<float> y(512 * 512);
  const Parallel refusing{RefuseToRun, nullptr};
  Check(!MatMulFloat8(kernels, owned.weight, x.get(), 512, y.data(), refusing),
        "a product's refusal is not noticed");
  Check(!RoundFloat8(kernels, kind, 1.0f, x.get(), 512 * 512, y.data(), refusing),
        "a rounding's refusal is not noticed");
  Check(!RoundFloat8Rows(kernels, kind, x.get(), 512, 512, y.data(), refusing),
        "a refusal to round rows is not noticed");
}

}  // namespace

int main(int argc, char** argv) {
  const KernelTable* kernels = Find(argc > 1 ? argv[1] : "best");
  if (!kernels) return kSkipped;
  for (const Float8Kind& kind : kFloat8Kinds) {
    RunCodes(*kernels, kind);
    for (const Case& c : {
             Case{1, 1, 1, true, true},
             Case{1, 31, 31, false, true},
             Case{7, 70, 70, true, false},
             Case{33, 64, 32, false, false},
             Case{45, 300, 96, false, true},
             Case{64, 1100, 1100, false, false},
             Case{70, 545, 32, false, false},
             Case{31, 777, 512, false, false},
             Case{38, 129, 1 << 20, false, true},
         })
      RunProduct(*kernels, kind, c, {0, 1, 2, 3, 4, 7, 8, 9, 33});
    // More rows than one task takes, then more than are copied together.
    RunProduct(*kernels, kind, {40, 803, 803, false, false}, {59, 247});
    RunProduct(*kernels, kind, {3, 9003, 512, false, true}, {247});
    RunRound(*kernels, kind);
    RunRoundRows(*kernels, kind);
  }
  RunRefusingPool(*kernels);
  return Report(*kernels);
}
