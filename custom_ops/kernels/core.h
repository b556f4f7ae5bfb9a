// The kernels, written once over a vector trait `Isa` and compiled once per ISA.
//
// This file holds what both kinds of activations share; int8.h and float32.h hold the products. All is
// included inside an anonymous namespace after the trait and uses no standard-library function, because an
// inline function compiled here for a newer processor could be the copy that the linker keeps for everybody.
//
// Words: a *vector* holds Isa::kLanes outputs, 4 bytes (one quad of consecutive inputs) each. A *limb* is a
// run of code bits that Isa::Dot can multiply without overflow; only 8-bit codes on AVX2 need two.

using onnxq::kernels::kBlockDepth;
using onnxq::kernels::KernelTable;
using onnxq::kernels::kMaxActivationBlock;
using onnxq::kernels::kQuads;
using onnxq::kernels::kRowBytes;
using onnxq::kernels::kTileOutputs;
using onnxq::kernels::QuantizedRows;
using onnxq::kernels::Range;
using onnxq::kernels::Segment;
using onnxq::kernels::Weight;

constexpr int kVectorBytes = Isa::kLanes * 4;
constexpr int kTileVectors = kTileOutputs / Isa::kLanes;

template <class T>
ONNXQ_INLINE T Min(T a, T b) {
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

/// Bits [Low, Low + Width) of the codes of quad `Quad`, a byte each.
template <int Bits, int Low, int Width, int Quad>
ONNXQ_INLINE Isa::Bytes Codes(const uint8_t* block) {
  Isa::Bytes code = Isa::ZeroBytes();
  Unroll<PlaneCount(Bits)>([&](auto plane) ONNXQ_INLINE_LAMBDA {
    constexpr Field field = PlaneField(Bits, decltype(plane)::value, Low, Width, Quad);
    if constexpr (field.mask != 0) {
      constexpr uint32_t mask = 0x01010101u * field.mask;
      const Isa::Bytes row = Isa::Load(block + field.row * kRowBytes);
      const Isa::Bytes part = Isa::template And<mask>(Isa::template Shift<field.shift>(row));
      code = decltype(plane)::value == 0 ? part : Isa::Or(code, part);
    }
  });
  return code;
}

/// The four codes of quad `Quad` as floats: f(Constant<j>, codes of input 4 * Quad + j) for j = 0 .. 3.
template <int Bits, int Quad, class F>
ONNXQ_INLINE void FloatCodes(const uint8_t* block, const F& f) {
  if constexpr (PlaneCount(Bits) == 1) {
    // Straight from the row: one shift and one mask a code.
    constexpr Field field = PlaneField(Bits, 0, 0, Bits, Quad);
    const Isa::Bytes row = Isa::Load(block + field.row * kRowBytes);
    Unroll<4>([&](auto byte) ONNXQ_INLINE_LAMBDA {
      const Isa::Bytes code =
          Isa::template And<field.mask>(Isa::template Shift<8 * byte.value + field.shift>(row));
      f(byte, Isa::ToFloats(Isa::AsInts(code)));
    });
  } else {
    const Isa::Bytes codes = Codes<Bits, 0, Bits, Quad>(block);
    Unroll<4>([&](auto byte) ONNXQ_INLINE_LAMBDA {
      const Isa::Bytes code = Isa::template And<255>(Isa::template Shift<8 * byte.value>(codes));
      f(byte, Isa::ToFloats(Isa::AsInts(code)));
    });
  }
}

ONNXQ_INLINE float SharedZero(const Weight& w) { return float(w.zeros[0]) / float(1 << (8 - w.bits)); }

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
ONNXQ_INLINE void LoadSums(const Weight& w, int64_t tile, int64_t rows, bool fresh, const float* y,
                           float* sums) {
  const int64_t count = fresh ? 0 : Min<int64_t>(kTileOutputs, w.outputs - tile * kTileOutputs);
  for (int64_t r = 0; r < rows; ++r, y += w.outputs, sums += kTileOutputs) {
    if (count == kTileOutputs) {
      CopyTile(y + tile * kTileOutputs, sums);
    } else {
      for (int64_t i = 0; i < kTileOutputs; ++i) sums[i] = i < count ? y[tile * kTileOutputs + i] : 0.0f;
    }
  }
}

ONNXQ_INLINE void StoreSums(const Weight& w, int64_t tile, int64_t rows, bool last, const float* sums,
                            float* y) {
  const int64_t count = Min<int64_t>(kTileOutputs, w.outputs - tile * kTileOutputs);
  for (int64_t r = 0; r < rows; ++r, y += w.outputs, sums += kTileOutputs) {
    if (last) {
      Finish(w, tile, sums, y);
    } else if (count == kTileOutputs) {
      CopyTile(sums, y + tile * kTileOutputs);
    } else {
      for (int64_t i = 0; i < count; ++i) y[tile * kTileOutputs + i] = sums[i];
    }
  }
}

#include "kernels/int8.h"

#include "kernels/float32.h"

constexpr KernelTable MakeTable(const char* name) {
  return {name,
          Isa::kGemmRows,
          Isa::kFloatRows,
          QuantizeRow,
          {nullptr, GemvInt8<1>, GemvInt8<2>, GemvInt8<3>, GemvInt8<4>, GemvInt8<5>, GemvInt8<6>, GemvInt8<7>,
           GemvInt8<8>},
          {nullptr, GemmInt8<1>, GemmInt8<2>, GemmInt8<3>, GemmInt8<4>, GemmInt8<5>, GemmInt8<6>, GemmInt8<7>,
           GemmInt8<8>},
          {nullptr, GemvF32<1>, GemvF32<2>, GemvF32<3>, GemvF32<4>, GemvF32<5>, GemvF32<6>, GemvF32<7>,
           GemvF32<8>},
          {nullptr, GemmF32<1>, GemmF32<2>, GemmF32<3>, GemmF32<4>, GemmF32<5>, GemmF32<6>, GemmF32<7>,
           GemmF32<8>}};
}
