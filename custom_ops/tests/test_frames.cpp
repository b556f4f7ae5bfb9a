// Analysis and synthesis of every ISA against the dense matrix that the definition spells out, over lengths,
// splits, blocks and row counts. Buffers are exactly as long as the shapes say, so that a sanitizer build
// sees any access beyond them.

#include <bit>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "kernels/dispatch.h"
#include "kernels/frame.h"
#include "tests/harness.h"

namespace {

using namespace onnxq::kernels;
using namespace onnxq::tests;

// Largest error over the root mean square of the inputs: float32 sums and matrices rounded to float32.
constexpr double kTolerance = 4e-6;
constexpr double kTurn = 6.283185307179586476925;

double Hadamard(int64_t i, int64_t j) { return std::popcount(uint64_t(i & j)) % 2 != 0 ? -1.0 : 1.0; }

double Hartley(int64_t u, int64_t v, int64_t odd) {
  const double angle = kTurn * double(u * v % odd) / double(odd);
  return std::cos(angle) + std::sin(angle);
}

/// The analysis [WideLength, Length], as the definition reads.
std::vector<double> Dense(const FrameShape& s, const std::vector<uint8_t>& signs, const float* block) {
  const int64_t right = s.middle * s.odd;
  const int64_t wide_right = right / s.narrow * s.wide;
  const int64_t length = s.Length();
  const double factor = 1.0 / std::sqrt(double(length));
  std::vector<double> right_mixing(size_t(right * right)), from_right(size_t(wide_right * right));
  for (int64_t r = 0; r < right; ++r)
    for (int64_t q = 0; q < right; ++q)
      right_mixing[size_t(r * right + q)] =
          factor * Hadamard(r / s.odd, q / s.odd) * Hartley(r % s.odd, q % s.odd, s.odd);
  for (int64_t q = 0; q < wide_right; ++q)
    for (int64_t r = 0; r < right; ++r)
      for (int64_t t = 0; t < s.narrow; ++t)
        from_right[size_t(q * right + r)] += right_mixing[size_t((q / s.wide * s.narrow + t) * right + r)] *
                                             double(block[t * s.wide + q % s.wide]);
  std::vector<double> dense(size_t(s.WideLength() * length));
  for (int64_t row = 0; row < s.WideLength(); ++row)
    for (int64_t column = 0; column < length; ++column) {
      const double sign = signs[size_t(column / 8)] >> column % 8 & 1 ? -1.0 : 1.0;
      dense[size_t(row * length + column)] = sign * Hadamard(row / wide_right, column / right) *
                                             from_right[size_t(row % wide_right * right + column % right)];
    }
  return dense;
}

/// Orthonormal rows by Gram and Schmidt.
std::unique_ptr<float[]> RandomBlock(Random& random, int64_t narrow, int64_t wide) {
  std::vector<double> rows(size_t(narrow * wide));
  for (int64_t i = 0; i < narrow; ++i) {
    double* row = rows.data() + i * wide;
    for (int64_t k = 0; k < wide; ++k) row[k] = random.Float() + (k == i ? 2.0 : 0.0);
    for (int64_t j = 0; j < i; ++j) {
      double dot = 0;
      for (int64_t k = 0; k < wide; ++k) dot += row[k] * rows[size_t(j * wide + k)];
      for (int64_t k = 0; k < wide; ++k) row[k] -= dot * rows[size_t(j * wide + k)];
    }
    double norm = 0;
    for (int64_t k = 0; k < wide; ++k) norm += row[k] * row[k];
    for (int64_t k = 0; k < wide; ++k) row[k] /= std::sqrt(norm);
  }
  auto block = std::make_unique<float[]>(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) block[i] = float(rows[i]);
  return block;
}

void Run(const KernelTable& kernels, const FrameShape& s) {
  Random random{uint64_t(s.Length() * 31 + s.wide)};
  const std::string name = std::string(kernels.isa) + " " + std::to_string(s.left) + "x" +
                           std::to_string(s.middle) + "x" + std::to_string(s.odd) + " block " +
                           std::to_string(s.narrow) + "x" + std::to_string(s.wide);
  std::vector<uint8_t> bits(size_t((s.Length() + 7) / 8));
  for (uint8_t& byte : bits) byte = uint8_t(random.Next());
  const std::unique_ptr<float[]> block = RandomBlock(random, s.narrow, s.wide);
  const std::vector<double> dense = Dense(s, bits, block.get());
  const std::vector<float> signs = UnpackSigns(bits.data(), s.Length());
  const Frame analysis(s, FrameDirection::kAnalysis, block.get(), kernels.lanes);
  const Frame synthesis(s, FrameDirection::kSynthesis, block.get(), kernels.lanes);
  Check(analysis.outputs() == s.WideLength() && synthesis.outputs() == s.Length(), "lengths " + name);
  const Parallel parallel{RunInTurn, nullptr};
  for (const int64_t rows : {0, 1, 3, 40}) {
    if (rows > 3 && s.Length() > 400) continue;
    for (const Frame* frame : {&analysis, &synthesis}) {
      const bool forward = frame == &analysis;
      const int64_t inputs = frame->inputs(), outputs = frame->outputs();
      const auto x = std::make_unique<float[]>(size_t(rows * inputs));
      const auto y = std::make_unique<float[]>(size_t(rows * outputs));
      for (int64_t i = 0; i < rows * inputs; ++i) x[size_t(i)] = random.Float();
      Check(TransformFrames(kernels, *frame, signs.data(), x.get(), rows, y.get(), parallel),
            "refused " + name);
      for (int64_t m = 0; m < rows; ++m)
        for (int64_t n = 0; n < outputs; ++n) {
          double expected = 0;
          for (int64_t k = 0; k < inputs; ++k)
            expected += double(x[size_t(m * inputs + k)]) *
                        dense[size_t(forward ? n * s.Length() + k : k * s.Length() + n)];
          Check(std::fabs(y[size_t(m * outputs + n)] - expected) <= kTolerance,
                (forward ? "analysis " : "synthesis ") + name + " rows " + std::to_string(rows));
        }
    }
    const auto x = std::make_unique<float[]>(size_t(rows * s.Length()));
    const auto wide = std::make_unique<float[]>(size_t(rows * s.WideLength()));
    const auto back = std::make_unique<float[]>(size_t(rows * s.Length()));
    for (int64_t i = 0; i < rows * s.Length(); ++i) x[size_t(i)] = random.Float();
    TransformFrames(kernels, analysis, signs.data(), x.get(), rows, wide.get(), parallel);
    TransformFrames(kernels, synthesis, signs.data(), wide.get(), rows, back.get(), parallel);
    for (int64_t i = 0; i < rows * s.Length(); ++i)
      Check(std::fabs(back[size_t(i)] - x[size_t(i)]) <= kTolerance, "round trip " + name);
  }
}

bool RefuseToRun(void*, Parallel::Task, size_t, void*) { return false; }

void RunRefusingPool(const KernelTable& kernels) {
  const float block = 1.0f;
  const Frame frame({32, 32, 1, 1, 1}, FrameDirection::kAnalysis, &block, kernels.lanes);
  const int64_t rows = 256;
  const std::vector<float> x(size_t(rows * frame.inputs())), signs(1024, 1.0f);
  std::vector<float> y(x.size());
  Check(!TransformFrames(kernels, frame, signs.data(), x.data(), rows, y.data(), {RefuseToRun, nullptr}),
        "a pool that refuses is not noticed");
}

}  // namespace

int main(int argc, char** argv) {
  const KernelTable* kernels = Find(argc > 1 ? argv[1] : "best");
  if (!kernels) return kSkipped;
  for (const FrameShape shape : {
           FrameShape{1, 1, 1, 1, 1},     FrameShape{1, 1, 1, 1, 2},      FrameShape{2, 1, 1, 1, 1},
           FrameShape{1, 4, 1, 2, 3},     FrameShape{1, 1, 3, 1, 1},      FrameShape{1, 1, 15, 1, 1},
           FrameShape{1, 1, 15, 5, 7},    FrameShape{1, 1, 15, 15, 16},   FrameShape{2, 2, 3, 6, 7},
           FrameShape{4, 1, 5, 1, 1},     FrameShape{16, 1, 7, 7, 8},     FrameShape{1, 16, 1, 16, 18},
           FrameShape{8, 16, 1, 16, 18},  FrameShape{2, 64, 1, 64, 70},   FrameShape{1, 256, 1, 256, 288},
           FrameShape{8, 16, 3, 1, 1},    FrameShape{8, 16, 3, 12, 14},   FrameShape{8, 16, 3, 16, 18},
           FrameShape{8, 16, 3, 8, 10},   FrameShape{8, 16, 3, 48, 54},   FrameShape{8, 8, 9, 12, 14},
           FrameShape{16, 16, 3, 16, 18}, FrameShape{2, 4, 43, 4, 5},     FrameShape{2, 4, 125, 1, 1},
           FrameShape{2, 4, 125, 20, 22}, FrameShape{1, 1, 301, 43, 48},  FrameShape{1, 1, 301, 301, 310},
           FrameShape{1024, 1, 1, 1, 1},  FrameShape{1, 1024, 1, 16, 18}, FrameShape{32, 32, 1, 32, 36},
           FrameShape{1, 1, 2049, 1, 1},
       })
    Run(*kernels, shape);
  RunRefusingPool(*kernels);
  return Report(*kernels);
}
