// x @ W.T + bias over any number of rows: splits the work, quantises x once, and runs an ISA's kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/problem.h"

namespace onnxq::kernels {

/// Runs task(argument, 0 .. count - 1) in any order, perhaps at the same time, and returns when all are done.
struct Parallel {
  using Task = void (*)(void* argument, size_t index);
  bool (*run)(void* pool, Task task, size_t count, void* argument);
  void* pool;
};

enum class Activations { kFloat32, kInt8 };

/// The segments of K for a weight of this depth and group; group_size is a multiple of 32.
std::vector<Segment> MakeSegments(int64_t depth, int64_t group_size, int64_t* activation_depth);

/// x: [rows, depth], y: [rows, outputs]. False when scratch memory or the pool is refused.
bool MatMul(const KernelTable& kernels, const Weight& weight, Activations activations, const float* x,
            int64_t rows, float* y, const Parallel& parallel);

}  // namespace onnxq::kernels
