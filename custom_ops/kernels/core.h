// The kernels, written once over a vector trait `Isa` and compiled once per ISA.
//
// This file holds what both kinds of activations share; int8.h and float32.h hold the products, columns.h
// what may come before them. uniform.h and codebook.h unpack: a `Format` of theirs is one tile of a weight
// and hands out its levels. All is included inside an anonymous namespace after the trait and uses no
// standard-library function, because an inline function compiled here for a newer processor could be the copy
// that the linker keeps for everybody.
//
// Words: a *vector* holds Isa::kLanes outputs, 4 bytes (one quad of consecutive inputs) each. A *limb* is a
// run of code bits that Isa::Dot can multiply without overflow; only 8-bit codes on AVX2 need two.

using onnxq::kernels::CodebookProducts;
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
constexpr int kTileVectors = kTileOutputs / Isa::kLanes;

template <class T>
ONNXQ_INLINE constexpr T Min(T a, T b) {
  return a < b ? a : b;
}

template <int... I>
struct Indices {};
template <int N, int... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int... I>
struct MakeIndices<0, I...> {
  using Type = Indices<I...>;
};
template <int I>
struct Constant {
  static constexpr int value = I;
};
template <class F, int... I>
ONNXQ_INLINE void UnrollOver(const F& f, Indices<I...>) {
  (f(Constant<I>{}), ...);
}
/// f(Constant<0>), f(Constant<1>), ... f(Constant<N - 1>), each inlined.
template <int N, class F>
ONNXQ_INLINE void Unroll(const F& f) {
  UnrollOver(f, typename MakeIndices<N>::Type{});
}

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

/// Writes gain * acc + bias for the outputs of one tile that exist.
ONNXQ_INLINE void Finish(const Weight& w, int64_t tile, const float* acc, float* y_row) {
  const int64_t first = tile * kTileOutputs;
  const int64_t count = Min<int64_t>(kTileOutputs, w.outputs - first);
  float* y = y_row + first;
  if (count == kTileOutputs) {
    const Isa::Floats gain = Isa::Broadcast(w.gain);
    for (int i = 0; i < kTileVectors; ++i) {
      const int at = i * Isa::kLanes;
      const Isa::Floats bias =
          w.shared_bias ? Isa::Broadcast(w.bias[0]) : Isa::LoadFloats(w.bias + first + at);
      Isa::StoreFloats(y + at, Isa::MulAdd(Isa::LoadFloats(acc + at), gain, bias));
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) y[i] = acc[i] * w.gain + w.bias[w.shared_bias ? 0 : first + i];
}

/// f(r, i) for every row and vector of a register block, unrolled: the arrays that f indexes stay in
/// registers.
template <int Rows, int Vectors, class F>
ONNXQ_INLINE void EachSum(const F& f) {
  Unroll<Rows>([&](auto row) ONNXQ_INLINE_LAMBDA {
    Unroll<Vectors>([&](auto vector)
                        ONNXQ_INLINE_LAMBDA { f(decltype(row)::value, decltype(vector)::value); });
  });
}

/// Calls f(Constant<count>) for a count that is only known at run time, 1 <= count <= Most.
template <int Most, class F>
ONNXQ_INLINE void WithCount(int64_t count, const F& f) {
  if constexpr (Most == 1) {
    f(Constant<1>{});
  } else {
    count >= Most ? f(Constant<Most>{}) : WithCount<Most - 1>(count, f);
  }
}

ONNXQ_INLINE void CopyTile(const float* from, float* to) {
  for (int i = 0; i < kTileOutputs; i += Isa::kLanes) Isa::StoreFloats(to + i, Isa::LoadFloats(from + i));
}

/// Partial sums of `rows` rows of one tile lie in y itself between two stretches of K.
ONNXQ_INLINE void LoadSums(const Weight& w, int64_t tile, int64_t row, int64_t rows, bool fresh,
                           const Output& out, float* sums) {
  const int64_t count = fresh ? 0 : Min<int64_t>(kTileOutputs, w.outputs - tile * kTileOutputs);
  const float* y = out.y + row * out.stride;
  for (int64_t r = 0; r < rows; ++r, y += out.stride, sums += kTileOutputs) {
    if (count == kTileOutputs) {
      CopyTile(y + tile * kTileOutputs, sums);
    } else {
      for (int64_t i = 0; i < kTileOutputs; ++i) sums[i] = i < count ? y[tile * kTileOutputs + i] : 0.0f;
    }
  }
}

ONNXQ_INLINE void StoreSums(const Weight& w, int64_t tile, int64_t row, int64_t rows, bool last,
                            const float* sums, const Output& out) {
  const int64_t count = Min<int64_t>(kTileOutputs, w.outputs - tile * kTileOutputs);
  float* y = out.y + row * out.stride;
  for (int64_t r = 0; r < rows; ++r, y += out.stride, sums += kTileOutputs) {
    if (last) {
      Finish(w, tile, sums, y);
    } else if (count == kTileOutputs) {
      CopyTile(sums, y + tile * kTileOutputs);
    } else {
      for (int64_t i = 0; i < count; ++i) y[tile * kTileOutputs + i] = sums[i];
    }
  }
}

#include "kernels/columns.h"

#include "kernels/int8.h"

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

constexpr KernelTable MakeTable(const char* name) {
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
          MultiplyFrame};
}
