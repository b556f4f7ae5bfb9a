// The kernels, written once over a vector trait `Isa` and compiled once per ISA.
//
// This file holds what both kinds of activations share; int8.h and float32.h hold the products, columns.h
// what may come before them. uniform.h and codebook.h unpack: a `Format` of theirs is one tile of a weight
// and hands out its levels. float8_core.h is apart. All is included inside an anonymous namespace after the
// trait and uses no standard-library function, because an inline function compiled here for a newer processor
// could be the copy that the linker keeps for everybody.
//
// Words: a *vector* holds Isa::kLanes outputs, 4 bytes (one quad of consecutive inputs) each. A *limb* is a
// run of code bits that Isa::Dot can multiply without overflow; only 8-bit codes on AVX2 need two.

using onnxq::kernels::Affine;
using onnxq::kernels::CodebookProducts;
using onnxq::kernels::Float8Kernels;
using onnxq::kernels::kBlockDepth;
using onnxq::kernels::KernelTable;
using onnxq::kernels::kMaxActivationBlock;
using onnxq::kernels::kQuads;
using onnxq::kernels::kRowBytes;
using onnxq::kernels::kStartQuads;
using onnxq::kernels::kTableLevelBits;
using onnxq::kernels::kTileOutputs;
using onnxq::kernels::Output;
using onnxq::kernels::Products;
using onnxq::kernels::QuantizedRows;
using onnxq::kernels::Range;
using onnxq::kernels::Segment;
using onnxq::kernels::Weight;

constexpr int kVectorBytes = Isa::kLanes * 4;

#include "kernels/unroll.h"

#include "kernels/sums.h"

#include "kernels/uniform.h"

#include "kernels/codebook.h"

/// What one step of a stored zero point is worth in levels.
template <class Format>
constexpr float kZeroUnit = 1.0f / float(1 << (8 - Format::kLevelBits));

/// The zero point of a whole weight, in levels; 0 where each group has its own.
template <class Format>
ONNXQ_INLINE float SharedZero(const Weight& w) {
  return w.shared_zero ? float(w.zeros[0]) * kZeroUnit<Format> : 0.0f;
}

#include "kernels/columns.h"

#include "kernels/int8.h"

constexpr int kFloatChunkBlocks = 8;  // 256 inputs: a panel of 16 outputs takes 16 KiB

#include "kernels/float_rows.h"

#include "kernels/float32.h"

#include "kernels/frame_rows.h"

template <class Format>
constexpr Products MakeProducts() {
  using L = Limbs<Format>;
  return {GemvInt8<Format>, GemmInt8<Format>, L::kCentred, GemvF32<Format>, GemmF32<Format>};
}

/// None for a window that does not hold a code.
template <int Bits, int Window>
constexpr Products MakeWindowProducts() {
  if constexpr (Window >= Bits) return MakeProducts<Codebook<Bits, Window>>();
  return {};
}

template <int Bits>
constexpr CodebookProducts MakeCodebookProducts() {
  return {{MakeWindowProducts<Bits, Bits>(), MakeWindowProducts<Bits, 4>(), MakeWindowProducts<Bits, 5>(),
           MakeWindowProducts<Bits, 6>()}};
}

constexpr KernelTable MakeTable(const char* name, const Float8Kernels& float8) {
  return {name,
          Isa::kGemmRows,
          Isa::kFloatRows,
          QuantizeRow,
          SumStarts<Isa>,
          ScaleColumns,
          {{},
           MakeProducts<Uniform<1>>(),
           MakeProducts<Uniform<2>>(),
           MakeProducts<Uniform<3>>(),
           MakeProducts<Uniform<4>>(),
           MakeProducts<Uniform<5>>(),
           MakeProducts<Uniform<6>>(),
           MakeProducts<Uniform<7>>(),
           MakeProducts<Uniform<8>>()},
          {{},
           MakeCodebookProducts<1>(),
           MakeCodebookProducts<2>(),
           MakeCodebookProducts<3>(),
           MakeCodebookProducts<4>(),
           MakeCodebookProducts<5>(),
           MakeCodebookProducts<6>()},
          Isa::kLanes,
          CopySigned,
          WalshHadamard,
          MultiplyFrame,
          &float8};
}
