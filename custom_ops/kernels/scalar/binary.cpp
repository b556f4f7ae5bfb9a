#include <cstdint>
#include <cstring>

#include "kernels/binary.h"
#include "kernels/compiler.h"
#include "kernels/half.h"
#include "kernels/problem.h"
#include "kernels/tables.h"

namespace {
#include "kernels/scalar/isa.h"

#include "kernels/unroll.h"

using onnxq::kernels::kBinaryHalf;
using onnxq::kernels::kBinaryTile;
using onnxq::kernels::kBlockDepth;
using onnxq::kernels::kByteZero;
using onnxq::kernels::kChunkDepth;
using onnxq::kernels::kKeys;

constexpr int kLookRows = 1;
constexpr double kBytesCost = 2.0;
constexpr double kFloatsCost = 2.0;
constexpr int kTableCopies = 1;
constexpr int kTileFloats = kBinaryTile / Isa::kLanes;

/// As in binary_words.h, byte by byte.
template <int Rows>
ONNXQ_INLINE void LookBytes(const uint8_t* codes, const uint8_t* tables, int64_t, int64_t chunks,
                            const float* scales, int64_t, Isa::Floats (&sums)[Rows][kTileFloats]) {
  static_assert(Rows == 1);
  int32_t entries[kBinaryTile];
  for (int j = 0; j < kBinaryTile; ++j) entries[j] = int32_t(-kByteZero * chunks);
  for (int64_t c = 0; c < chunks; ++c, codes += kBinaryHalf, tables += kKeys)
    for (int j = 0; j < kBinaryHalf; ++j) {
      entries[j] += tables[codes[j] & 15];
      entries[kBinaryHalf + j] += tables[codes[j] >> 4];
    }
  const Isa::Floats scale = Isa::Broadcast(scales[0]);
  for (int i = 0; i < kTileFloats; ++i)
    sums[0][i] = Isa::MulAdd(Isa::ToFloats(LoadAs<Isa::Ints>(entries + i * Isa::kLanes)), scale, sums[0][i]);
}

ONNXQ_INLINE void OrderRows(Isa::Floats (&)[kTileFloats]) {}

/// A chunk's table of floats.
struct FloatTable {
  const float* entries;
  explicit ONNXQ_INLINE FloatTable(const float* p) : entries(p) {}
  static ONNXQ_INLINE Unsigned4 LoadBytes(const uint8_t* bytes) {
    return Unsigned4{bytes[0], bytes[1], bytes[2], bytes[3]};
  }
  /// For each of four bytes: the entries of its low and its high four bits.
  ONNXQ_INLINE void Look(const uint8_t* b, Float4& low, Float4& high) const {
    low = Float4{entries[b[0] & 15], entries[b[1] & 15], entries[b[2] & 15], entries[b[3] & 15]};
    high = Float4{entries[b[0] >> 4], entries[b[1] >> 4], entries[b[2] >> 4], entries[b[3] >> 4]};
  }
};

#include "kernels/binary_core.h"
}  // namespace

namespace onnxq::kernels {
const BinaryKernels kScalarBinary = MakeBinaryKernels(kScalar);
}
