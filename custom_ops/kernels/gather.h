// Decodes single rows of a packed weight. The same plain C++ on every processor: a row is too short to
// matter.
#pragma once

#include <cstdint>

#include "kernels/problem.h"

namespace onnxq::kernels {

/// Writes row `row` (0 <= row < outputs) as `depth` floats.
void DecodeRow(const Weight& weight, int64_t row, float* out);

}  // namespace onnxq::kernels
