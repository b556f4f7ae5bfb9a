// Weights that are sums of signs: W[n, k] = gain * (sum_p scale[p, n, g] * (+-1) + offset[n, g]).
//
// A *plane* is a bit of every weight and a scale of every group. Rows are stored in an order of their own, in
// tiles of 64; plane p belongs to the first rows alone. A *chunk* is four inputs: a byte of it holds the
// *keys*, four bits each, of two rows.
#pragma once

#include <cstdint>

#include "kernels/matmul.h"
#include "kernels/problem.h"

namespace onnxq::kernels {

constexpr int kMaxPlanes = 6;
constexpr int kBinaryTile = 64;  ///< rows of a tile
constexpr int kBinaryHalf =
    32;  ///< byte j of a chunk: row j in its low four bits, row 32 + j in its high ones
constexpr int kChunkDepth = 4;   ///< inputs of a chunk
constexpr int kKeys = 16;        ///< entries of a chunk's table: its sums of x, one for each key
constexpr int kByteZero = 128;   ///< the byte of a sum that is zero
constexpr int kTableDepth = 64;  ///< inputs whose int8 tables share a scale, at most

struct BinaryPlane {
  const uint8_t* codes;    ///< [tiles, chunks, 32]
  const uint16_t* scales;  ///< float16 bits, [tiles, groups, 64]
  int64_t rows;
};

/// One weight; pointers are borrowed. `outputs` are rows in stored order.
struct BinaryWeight : Affine {
  BinaryPlane planes[kMaxPlanes];
  int plane_count;
  const uint16_t* offsets;  ///< float16 bits, [tiles, groups, 64]; null: none
  const int32_t* rank;      ///< [outputs]: where each row is stored; null: as it is
  int64_t tiles;            ///< ceil(outputs / 64)
  int64_t chunks;           ///< 8 * ceil(depth / 32)
  int64_t group_depth;      ///< a multiple of 32
  int64_t groups;
  int64_t group_tables;  ///< scales of int8 tables in a group: ceil(group_depth / 64)
};

/// Tables of rows of x.
struct BinaryTables {
  uint8_t* bytes;  ///< [rows, chunks, kKeys * BinaryKernels::copies]: sums over their scale, plus 128
  float* floats;   ///< [rows, chunks, kKeys]; bytes or floats, not both
  float* scales;   ///< [rows, groups, group_tables], of bytes
  float* sums;     ///< [rows, groups]: sums of x
};

/// One ISA's kernels. Tiles of a range are those of 64 rows.
struct BinaryKernels {
  const KernelTable* common;  ///< its other kernels
  int copies;                 ///< of a chunk's int8 table
  /// Times of looking up one row of x in one plane, by int8 tables and by float tables, over that of
  /// multiplying it by a decoded weight.
  double bytes_cost, floats_cost;
  /// Tables of one row of x, `depth` long.
  void (*make_bytes)(const BinaryWeight&, const float* x, const BinaryTables& row);
  void (*make_floats)(const BinaryWeight&, const float* x, const BinaryTables& row);
  void (*look_bytes)(const BinaryWeight&, const BinaryTables&, const Range&, const Output&);
  void (*look_floats)(const BinaryWeight&, const BinaryTables&, const Range&, const Output&);
  /// x: [rows, depth]; decodes the weight.
  void (*many_rows)(const BinaryWeight&, const float* x, const Range&, const Output&);
};

extern const BinaryKernels kScalarBinary;
extern const BinaryKernels kAvx2Binary;
extern const BinaryKernels kAvx512VnniBinary;
extern const BinaryKernels kAvx512VnniEmulatedBinary;  ///< only in the test program

/// Those of the same ISA.
const BinaryKernels& BinaryKernelsOf(const KernelTable& kernels);

/// y [rows, outputs] = x [rows, depth] @ W.T + bias. False when scratch memory or the pool is refused.
bool MatMulBinary(const BinaryKernels& kernels, const BinaryWeight& weight, Activations activations,
                  const float* x, int64_t rows, float* y, const Parallel& parallel);

/// Writes row `row` (0 <= row < outputs) of the weight as `depth` floats.
void DecodeBinaryRow(const BinaryWeight& weight, int64_t row, float* out);

}  // namespace onnxq::kernels
