// Products and rounding of 8-bit floats over a vector trait `Isa`, apart from core.h because that takes
// minutes to compile. Included inside an anonymous namespace after the trait; like core.h it uses no
// standard-library function.
//
// Codes lie as the weight reads, [N, K], so an output is a dot product along K. Few rows of x meet the codes
// as these are decoded. Many rows meet a stripe: codes decoded once, turned so that a vector holds
// consecutive outputs.

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

constexpr int kFloatChunkBlocks = 16;  // 512 inputs: sums are taken up half as often as in core.h, 2 % faster

#include "kernels/float_rows.h"

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

constexpr int kLine = 64;  // bytes of a line of the cache
constexpr int kTurn = 16;  // bytes that are turned at a time: outputs times inputs
using TurnBytes = uint8_t __attribute__((vector_size(kTurn)));

/// to [16][32], at 0 to 16: rows [16][kLine] turned into columns. Four rounds that pair a byte of one half of
/// the rows with one of the other half do that.
ONNXQ_INLINE void TurnCodes(const uint8_t* rows, uint8_t* to) {
  TurnBytes v[kTurn];
  Unroll<kTurn>([&](auto row) ONNXQ_INLINE_LAMBDA {
    constexpr int i = decltype(row)::value;
    __builtin_memcpy(&v[i], rows + i * kLine, kTurn);
  });
  Unroll<4>([&](auto) ONNXQ_INLINE_LAMBDA {
    TurnBytes w[kTurn];
    Unroll<kTurn / 2>([&](auto pair) ONNXQ_INLINE_LAMBDA {
      constexpr int i = decltype(pair)::value;
      constexpr int j = i + kTurn / 2;
      w[2 * i] = __builtin_shufflevector(v[i], v[j], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      w[2 * i + 1] =
          __builtin_shufflevector(v[i], v[j], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    });
    __builtin_memcpy(v, w, sizeof v);
  });
  Unroll<kTurn>([&](auto row) ONNXQ_INLINE_LAMBDA {
    constexpr int i = decltype(row)::value;
    __builtin_memcpy(to + i * kTileOutputs, &v[i], kTurn);
  });
}

/// The codes of one tile. Outputs beyond the last are copies of it, which nobody will store.
struct TileCodes {
  const Float8Weight& w;
  int64_t outputs[kTileOutputs];

  ONNXQ_INLINE TileCodes(const Float8Weight& weight, int64_t tile) : w(weight) {
    for (int i = 0; i < kTileOutputs; ++i) outputs[i] = Min(tile * kTileOutputs + i, w.outputs - 1);
  }

  /// lines [32][kLine]: inputs from k on, zero beyond the last. Copied because rows that lie a power of two
  /// apart displace each other in the cache before their lines are used up.
  ONNXQ_INLINE void Copy(int64_t k, uint8_t* lines) const {
    const int64_t count = Min<int64_t>(kLine, w.depth - k);
    for (int i = 0; i < kTileOutputs; ++i, lines += kLine) {
      const uint8_t* from = w.codes + outputs[i] * w.depth + k;
      if (count == kLine) {
        // What the next stripes of this tile will read; the processor does not look ahead on so many rows.
        __builtin_prefetch(from + Min<int64_t>(kFloatChunkBlocks * kBlockDepth, w.depth - k));
        __builtin_memcpy(lines, from, kLine);
      } else {
        for (int64_t j = 0; j < kLine; ++j) lines[j] = j < count ? from[j] : 0;
      }
    }
  }
};

/// stripe [kPanels][kFloatChunkBlocks * 32][kPanelOutputs]: inputs [begin, end) of one tile, times its
/// scales.
template <int MantissaBits>
ONNXQ_NOINLINE void DecodeStripe(const Float8Weight& w, int64_t tile, int64_t begin, int64_t end,
                                 float* stripe) {
  static_assert(kPanelOutputs == kStep);
  const TileCodes codes(w, tile);
  Isa::Floats scales[kTileVectors];
  int64_t group = begin / w.group_depth;
  TileScales(w, tile, group, scales);
  alignas(64) uint8_t lines[kTileOutputs * kLine];
  for (int64_t k = begin; k < end; k += kTurn, stripe += kTurn * kPanelOutputs) {
    if (k % kLine == 0) codes.Copy(k, lines);
    if (k == (group + 1) * w.group_depth) TileScales(w, tile, ++group, scales);
    alignas(64) uint8_t turned[kTurn * kTileOutputs];
    for (int i = 0; i < kTileOutputs; i += kTurn) TurnCodes(lines + i * kLine + k % kLine, turned + i);
    for (int j = 0; j < kTurn; ++j)
      for (int panel = 0; panel < kPanels; ++panel) {
        Isa::Floats values[2];
        Isa::template Float8<MantissaBits>(turned + j * kTileOutputs + panel * kStep, values);
        float* to = stripe + (panel * kFloatChunkBlocks * kBlockDepth + j) * kPanelOutputs;
        for (int i = 0; i < 2; ++i)
          Isa::StoreFloats(to + i * Isa::kLanes, Isa::Mul(values[i], scales[2 * panel + i]));
      }
  }
}

template <int MantissaBits>
void ManyRows(const Float8Weight& w, const float* x, const Range& range, const Output& out) {
  alignas(64) float stripe[kFloatChunkBlocks * kBlockDepth * kTileOutputs];
  const int64_t blocks = (w.depth + kBlockDepth - 1) / kBlockDepth;
  for (int64_t b = 0; b < blocks; b += kFloatChunkBlocks) {
    const int64_t b_end = Min(b + kFloatChunkBlocks, blocks);
    for (int64_t tile = range.tile_begin; tile < range.tile_end; ++tile) {
      DecodeStripe<MantissaBits>(w, tile, b * kBlockDepth, Min(b_end * kBlockDepth, w.depth), stripe);
      MultiplyFloatStripe(w, stripe, tile, b, b_end, x, range, out);
    }
  }
}

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
