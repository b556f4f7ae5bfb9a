// Products and rounding of 8-bit floats over a vector trait `Isa`, apart from core.h because that takes
// minutes to compile. Included inside an anonymous namespace after the trait; like core.h it uses no
// standard-library function.
//
// Codes lie as the weight reads, [N, K], so an output is a dot product along K. Few rows of x meet the codes
// as these are decoded. Many rows (float8_rows.h) meet panels: codes decoded once, turned so that a vector
// holds consecutive outputs.

using onnxq::kernels::Affine;
using onnxq::kernels::Float8Kernels;
using onnxq::kernels::Float8Kind;
using onnxq::kernels::Float8Products;
using onnxq::kernels::Float8Weight;
using onnxq::kernels::kBlockDepth;
using onnxq::kernels::kTileOutputs;
using onnxq::kernels::Output;
using onnxq::kernels::Range;

#include "kernels/unroll.h"

#include "kernels/sums.h"

constexpr int kStep = 2 * Isa::kLanes;  // codes that are decoded together
static_assert(kBlockDepth % kStep == 0, "groups are whole steps");

/// Scales of groups [group, group + kLanes) of one output; anything for those that there are not.
ONNXQ_INLINE Isa::Floats GroupScales(const Float8Weight& w, int64_t output, int64_t group) {
  const int64_t first = w.shared_scale ? 0 : output * w.groups + group;
  const int64_t count = (w.shared_scale ? 1 : w.outputs * w.groups) - first;
  const uint16_t* scales = w.scales + first;
  uint16_t last[Isa::kLanes] = {};
  if (count < Isa::kLanes) {
    for (int64_t i = 0; i < count; ++i) last[i] = scales[i];
    scales = last;
  }
  return Isa::Mul(Isa::LoadHalfFloats(scales), Isa::Broadcast(w.unit));
}

/// The scales of one group of a tile's outputs; beyond the last output its own again.
ONNXQ_INLINE void TileScales(const Float8Weight& w, int64_t tile, int64_t group, Isa::Floats* scales) {
  uint16_t halves[kTileOutputs];
  for (int i = 0; i < kTileOutputs; ++i) {
    const int64_t output = Min(tile * kTileOutputs + i, w.outputs - 1);
    halves[i] = w.scales[w.shared_scale ? 0 : output * w.groups + group];
  }
  for (int i = 0; i < kTileVectors; ++i)
    scales[i] = Isa::Mul(Isa::LoadHalfFloats(halves + i * Isa::kLanes), Isa::Broadcast(w.unit));
}

/// Copies fewer than kStep values and fills up with zeros.
template <class T>
ONNXQ_INLINE void CopyLast(const T* from, int64_t count, T* to) {
  for (int64_t i = 0; i < kStep; ++i) to[i] = i < count ? from[i] : T{0};
}

/// dot[r][o] += one step of row r of x times one of output o.
template <int MantissaBits, int Rows, int Outputs>
ONNXQ_INLINE void AddStep(const float* x, int64_t x_stride, const uint8_t* codes, int64_t stride,
                          Isa::Floats (&dot)[Rows][Outputs]) {
  Unroll<Outputs>([&](auto output) ONNXQ_INLINE_LAMBDA {
    constexpr int o = decltype(output)::value;
    Isa::Floats values[2];
    Isa::template Float8<MantissaBits>(codes + o * stride, values);
    Unroll<Rows>([&](auto row) ONNXQ_INLINE_LAMBDA {
      constexpr int r = decltype(row)::value;
      const float* at = x + r * x_stride;
      dot[r][o] = Isa::MulAdd(values[0], Isa::LoadFloats(at), dot[r][o]);
      dot[r][o] = Isa::MulAdd(values[1], Isa::LoadFloats(at + Isa::kLanes), dot[r][o]);
    });
  });
}

/// dot += rows of x times outputs that begin at `codes`, over inputs [k, end); returns end. last_x: [Rows,
/// kStep], what of x is left after whole steps.
template <int MantissaBits, int Rows, int Outputs>
ONNXQ_INLINE int64_t AddStretch(const Float8Weight& w, const float* x, const float* last_x,
                                const uint8_t* codes, int64_t ahead, int64_t k, int64_t end,
                                Isa::Floats (&dot)[Rows][Outputs]) {
  for (; k + kBlockDepth <= end; k += kBlockDepth) {
    for (int o = 0; o < Outputs; ++o) __builtin_prefetch(codes + o * w.depth + k + ahead);
    Unroll<kBlockDepth / kStep>([&](auto step) ONNXQ_INLINE_LAMBDA {
      const int64_t at = k + decltype(step)::value * kStep;
      AddStep<MantissaBits>(x + at, w.depth, codes + at, w.depth, dot);
    });
  }
  for (; k + kStep <= end; k += kStep) AddStep<MantissaBits>(x + k, w.depth, codes + k, w.depth, dot);
  if (k < end) {
    uint8_t last[Outputs][kStep];
    for (int o = 0; o < Outputs; ++o) CopyLast(codes + o * w.depth + k, end - k, last[o]);
    AddStep<MantissaBits>(last_x, kStep, last[0], kStep, dot);
  }
  return end;
}

/// sums [Rows][32], at 0 to Outputs: rows of x times outputs from `first` on. Times their scales where there
/// are groups.
template <int MantissaBits, int Rows, int Outputs>
ONNXQ_INLINE void Dots(const Float8Weight& w, const float* x, const float* last_x, int64_t first,
                       float* sums) {
  const uint8_t* codes = w.codes + first * w.depth;
  // The outputs that follow: the processor itself does not look ahead beyond a page, which may be a single
  // output.
  const int64_t ahead = first + 2 * Outputs <= w.outputs ? Outputs * w.depth : 0;
  Isa::Floats total[Rows][Outputs];
  EachSum<Rows, Outputs>([&](int r, int o) ONNXQ_INLINE_LAMBDA { total[r][o] = Isa::ZeroFloats(); });
  if (w.groups == 1) {
    AddStretch<MantissaBits>(w, x, last_x, codes, ahead, 0, w.depth, total);
  } else {
    alignas(64) float scales[Outputs][Isa::kLanes];
    int64_t k = 0;
    for (int64_t group = 0; group < w.groups; ++group) {
      if (group % Isa::kLanes == 0)
        for (int o = 0; o < Outputs; ++o) Isa::StoreFloats(scales[o], GroupScales(w, first + o, group));
      Isa::Floats dot[Rows][Outputs];
      EachSum<Rows, Outputs>([&](int r, int o) ONNXQ_INLINE_LAMBDA { dot[r][o] = Isa::ZeroFloats(); });
      k = AddStretch<MantissaBits>(w, x, last_x, codes, ahead, k, Min(k + w.group_depth, w.depth), dot);
      EachSum<Rows, Outputs>([&](int r, int o) ONNXQ_INLINE_LAMBDA {
        total[r][o] = Isa::MulAdd(dot[r][o], Isa::Broadcast(scales[o][group % Isa::kLanes]), total[r][o]);
      });
    }
  }
  EachSum<Rows, Outputs>([&](int r, int o)
                             ONNXQ_INLINE_LAMBDA { sums[r * kTileOutputs + o] = Isa::Sum(total[r][o]); });
}

constexpr int kDotRows = 4;
/// Outputs that are summed at a time: loads of x serve all of them, and their sums stay in registers.
constexpr int DotOutputs(int rows) { return rows == 1 ? 4 : 2; }

template <int MantissaBits, int Rows>
ONNXQ_NOINLINE void DotTile(const Float8Weight& w, const float* x, int64_t tile, int64_t row,
                            const Output& out) {
  x += row * w.depth;
  float last_x[Rows * kStep];
  const int64_t rest = w.depth % kStep;
  for (int r = 0; r < Rows; ++r) CopyLast(x + (r + 1) * w.depth - rest, rest, last_x + r * kStep);
  alignas(64) float sums[Rows * kTileOutputs] = {};
  const int64_t first = tile * kTileOutputs;
  const int64_t count = Min<int64_t>(kTileOutputs, w.outputs - first);
  for (int64_t n = 0; n < count;) {
    WithCount<DotOutputs(Rows)>(count - n, [&](auto outputs) ONNXQ_INLINE_LAMBDA {
      constexpr int kOutputs = decltype(outputs)::value;
      Dots<MantissaBits, Rows, kOutputs>(w, x, last_x, first + n, sums + n);
      n += kOutputs;
    });
  }
  if (w.groups == 1) {
    Isa::Floats scales[kTileVectors];
    TileScales(w, tile, 0, scales);
    for (int i = 0; i < Rows * kTileVectors; ++i) {
      float* at = sums + i * Isa::kLanes;
      Isa::StoreFloats(at, Isa::Mul(Isa::LoadFloats(at), scales[i % kTileVectors]));
    }
  }
  StoreSums(w, tile, row, Rows, true, sums, out);
}

template <int MantissaBits>
void FewRows(const Float8Weight& w, const float* x, const Range& range, const Output& out) {
  for (int64_t tile = range.tile_begin; tile < range.tile_end; ++tile)
    for (int64_t row = range.row_begin; row < range.row_end;) {
      WithCount<kDotRows>(range.row_end - row, [&](auto rows) ONNXQ_INLINE_LAMBDA {
        constexpr int kRows = decltype(rows)::value;
        DotTile<MantissaBits, kRows>(w, x, tile, row, out);
        row += kRows;
      });
    }
}

#include "kernels/float8_rows.h"

template <int MantissaBits>
void DecodeRow(const Float8Weight& w, int64_t row, float* out) {
  const uint8_t* codes = w.codes + row * w.depth;
  const Isa::Floats gain = Isa::Broadcast(w.gain);
  alignas(64) float scales[Isa::kLanes];
  int64_t k = 0;
  for (int64_t group = 0; group < w.groups; ++group) {
    if (group % Isa::kLanes == 0) Isa::StoreFloats(scales, GroupScales(w, row, group));
    const Isa::Floats scale = Isa::Broadcast(scales[group % Isa::kLanes]);
    const auto decode = [&](const uint8_t* from, float* to) ONNXQ_INLINE_LAMBDA {
      Isa::Floats values[2];
      Isa::template Float8<MantissaBits>(from, values);
      for (int i = 0; i < 2; ++i)
        Isa::StoreFloats(to + i * Isa::kLanes, Isa::Mul(Isa::Mul(values[i], scale), gain));
    };
    const int64_t end = Min(k + w.group_depth, w.depth);
    for (; k + kStep <= end; k += kStep) decode(codes + k, out + k);
    if (k < end) {
      uint8_t last[kStep];
      float values[kStep];
      CopyLast(codes + k, end - k, last);
      decode(last, values);
      for (int64_t i = 0; k < end; ++i, ++k) out[k] = values[i];
    }
  }
}

using Bits = uint32_t __attribute__((vector_size(sizeof(Isa::Floats))));

/// scale * (x / scale rounded to the nearest value of the kind, to the even one of two).
struct Rounding {
  Isa::Floats scale, largest;
  Bits least;  // exponent of the smallest normal value: those below share its spacing
  uint32_t shift;

  ONNXQ_INLINE Rounding(const Float8Kind& kind, float by)
      : scale(Isa::Broadcast(by)),
        largest(Isa::Broadcast(kind.largest)),
        least(Bits{} + (uint32_t(128 - kind.exponent_bias) << 23)),
        shift(uint32_t(23 - kind.mantissa_bits) << 23) {}

  ONNXQ_INLINE Isa::Floats operator()(Isa::Floats x) const {
    constexpr uint32_t kSign = 0x80000000u;
    const Isa::Floats ratio = x / scale;
    const Isa::Floats magnitude = Isa::Floats(Bits(ratio) & ~kSign);
    const Isa::Floats clamped = magnitude > largest ? largest : magnitude;  // not a number stays as it is
    const Bits exponent = Bits(clamped) & 0x7f800000u;
    // Beside a number so much larger, a float32 has no room for anything finer than the spacing of the kind.
    const Isa::Floats coarse = Isa::Floats((exponent > least ? exponent : least) + shift);
    const Isa::Floats rounded = (clamped + coarse) - coarse;
    return Isa::Floats(Bits(rounded) | (Bits(ratio) & kSign)) * scale;
  }
};

void Round(const Float8Kind& kind, float scale, const float* x, int64_t count, float* y) {
  const Rounding round(kind, scale);
  int64_t i = 0;
  for (; i + Isa::kLanes <= count; i += Isa::kLanes) Isa::StoreFloats(y + i, round(Isa::LoadFloats(x + i)));
  if (i < count) {
    float last[kStep];
    CopyLast(x + i, count - i, last);
    Isa::StoreFloats(last, round(Isa::LoadFloats(last)));
    for (int64_t j = 0; i < count; ++i, ++j) y[i] = last[j];
  }
}

float LargestMagnitude(const float* x, int64_t count) {
  Isa::Ints top = Isa::ZeroInts();
  int64_t i = 0;
  for (; i + kBlockDepth <= count; i += kBlockDepth) Isa::AbsMax32(x + i, top);
  if (i < count) {
    float last[kBlockDepth];
    for (int64_t j = 0; j < kBlockDepth; ++j) last[j] = i + j < count ? x[i + j] : 0.0f;
    Isa::AbsMax32(last, top);
  }
  return Isa::LargestFloat(top);
}

template <int MantissaBits>
constexpr Float8Products MakeFloat8Products() {
  return {FewRows<MantissaBits>, ManyRows<MantissaBits>, DecodeRow<MantissaBits>};
}

constexpr Float8Kernels MakeFloat8Kernels() {
  return {MakeFloat8Products<3>(), MakeFloat8Products<2>(), Round, LargestMagnitude};
}
