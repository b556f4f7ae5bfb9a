// Weights and activations of 8-bit floats: splits the work and runs an ISA's kernels.
#pragma once

#include <cstdint>

#include "kernels/matmul.h"
#include "kernels/problem.h"

namespace onnxq::kernels {

/// Float8Weight::unit of a kind.
float Float8Unit(const Float8Kind& kind);

/// y [rows, outputs] = x [rows, depth] @ W.T + bias. False when the pool refuses.
bool MatMulFloat8(const KernelTable& kernels, const Float8Weight& weight, const float* x, int64_t rows,
                  float* y, const Parallel& parallel);

/// Writes row `row` (0 <= row < outputs) as `depth` floats.
void DecodeFloat8Row(const KernelTable& kernels, const Float8Weight& weight, int64_t row, float* out);

/// y = scale * (x / scale rounded to the nearest value of the kind, to the even one of two). Beyond the
/// largest value stands the largest value; what is not a number stays so. False when the pool refuses.
bool RoundFloat8(const KernelTable& kernels, const Float8Kind& kind, float scale, const float* x,
                 int64_t count, float* y, const Parallel& parallel);

/// The same for each of `rows` rows with the scale that takes its largest magnitude to the kind's largest
/// value; 1 where that would be zero.
bool RoundFloat8Rows(const KernelTable& kernels, const Float8Kind& kind, const float* x, int64_t rows,
                     int64_t width, float* y, const Parallel& parallel);

}  // namespace onnxq::kernels
