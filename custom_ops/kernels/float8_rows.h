// Many rows of x times 8-bit floats. Included inside an anonymous namespace by float8_core.h.
//
// Codes are decoded once for all rows of a range, to panels of consecutive outputs that the first-level cache
// holds; a register block of rows then meets a whole panel. x comes in strips (see Float8Strips), read from
// start to end: rows of x itself may lie a multiple of 4096 bytes apart, and then displace each other.

using onnxq::kernels::Float8Strips;
using onnxq::kernels::kFloat8Chunk;
using onnxq::kernels::kFloat8Step;

constexpr int kPanelOutputs = Isa::kFloatVectors * Isa::kLanes;
constexpr int kLine = 64;  // bytes of a line of the cache
constexpr int kTurn = 16;  // outputs, and codes of each, that are turned at a time
/// Outputs that are decoded together: one panel, or as many as are turned together.
constexpr int kDecoded = kPanelOutputs < kTurn ? kTurn : kPanelOutputs;
static_assert(kTileOutputs % kDecoded == 0 && kDecoded % kPanelOutputs == 0 && kDecoded % kTurn == 0);
static_assert(kTurn % Isa::kLanes == 0 && kPanelOutputs % Isa::kLanes == 0);
static_assert(kFloat8Chunk % kLine == 0 && kLine % kTurn == 0 && kTurn % kFloat8Step == 0);

using TurnBytes = uint8_t __attribute__((vector_size(kTurn)));
/// Two codes, of consecutive inputs, of each of kTurn outputs.
using Pairs = uint16_t __attribute__((vector_size(2 * kTurn)));
using SignedPairs = int16_t __attribute__((vector_size(2 * kTurn)));
constexpr int kPairs = kTurn / 2;

/// pairs [kPairs]: kTurn rows of kTurn codes, `stride` apart, turned. Three rounds that pair an entry of one
/// half of the rows with one of the other half do that, for eight rows in each half of a vector.
ONNXQ_INLINE void TurnCodes(const uint8_t* rows, int64_t stride, Pairs* pairs) {
  Pairs v[kPairs];
  Unroll<kPairs>([&](auto row) ONNXQ_INLINE_LAMBDA {
    constexpr int i = decltype(row)::value;
    TurnBytes half[2];
    __builtin_memcpy(&half[0], rows + i * stride, kTurn);
    __builtin_memcpy(&half[1], rows + (i + kPairs) * stride, kTurn);
    v[i] = Pairs(__builtin_shufflevector(half[0], half[1], 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14,
                                         15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31));
  });
  Unroll<3>([&](auto) ONNXQ_INLINE_LAMBDA {
    Pairs w[kPairs];
    Unroll<kPairs / 2>([&](auto pair) ONNXQ_INLINE_LAMBDA {
      constexpr int i = decltype(pair)::value;
      constexpr int j = i + kPairs / 2;
      w[2 * i] =
          __builtin_shufflevector(v[i], v[j], 0, 16, 1, 17, 2, 18, 3, 19, 8, 24, 9, 25, 10, 26, 11, 27);
      w[2 * i + 1] =
          __builtin_shufflevector(v[i], v[j], 4, 20, 5, 21, 6, 22, 7, 23, 12, 28, 13, 29, 14, 30, 15, 31);
    });
    __builtin_memcpy(v, w, sizeof v);
  });
  __builtin_memcpy(pairs, v, sizeof v);
}

/// values [kTurn / kLanes]: of codes in the upper bytes, read as halves as Isa::Float8 does.
template <int MantissaBits>
ONNXQ_INLINE void UpperValues(const Pairs& codes, Isa::Floats* values) {
  Pairs half = Pairs(SignedPairs(codes) >> int16_t(1)) & uint16_t(0xbf80);
  if constexpr (MantissaBits == 2) {
    const SignedPairs beyond = SignedPairs(half & uint16_t(0x3f80)) - int16_t(0x400);
    half += Pairs(beyond & (beyond > int16_t(0)));
  }
  alignas(32) uint16_t halves[kTurn];
  __builtin_memcpy(halves, &half, sizeof half);
  Unroll<kTurn / Isa::kLanes>([&](auto vector) ONNXQ_INLINE_LAMBDA {
    constexpr int i = decltype(vector)::value;
    values[i] = LoadFiniteHalves(halves + i * Isa::kLanes);
  });
}

/// kDecoded outputs from `first` on; beyond the last of the weight its own again, which nobody will store.
template <int MantissaBits, bool Scaled>
class Panels {
 public:
  ONNXQ_INLINE Panels(const Float8Weight& weight, int64_t first)
      : w_(weight), apart_(first + kDecoded <= weight.outputs && weight.depth % 512 != 0) {
    for (int i = 0; i < kDecoded; ++i) outputs_[i] = Min(first + i, w_.outputs - 1);
  }

  /// scales [kDecoded]: of one group, times w.unit.
  ONNXQ_INLINE void Scales(int64_t group, float* scales) const {
    alignas(64) uint16_t halves[kDecoded];
    for (int i = 0; i < kDecoded; ++i)
      halves[i] = w_.scales[w_.shared_scale ? 0 : outputs_[i] * w_.groups + group];
    for (int i = 0; i < kDecoded; i += Isa::kLanes)
      Isa::StoreFloats(scales + i, Isa::Mul(Isa::LoadHalfFloats(halves + i), Isa::Broadcast(w_.unit)));
  }

  /// panels [kDecoded / kPanelOutputs][kFloat8Chunk][kPanelOutputs]: inputs [begin, end), zeros after that
  /// to whole kTurn; times the scales of their groups where Scaled.
  ONNXQ_INLINE void Decode(int64_t begin, int64_t end, float* panels) const {
    int64_t group = begin / w_.group_depth;
    alignas(64) float scales[kDecoded];
    if constexpr (Scaled) Scales(group, scales);
    alignas(64) uint8_t lines[kDecoded * kLine];
    const uint8_t* rows = lines;
    int64_t stride = kLine;
    for (int64_t k = begin; k < end; k += kTurn, rows += kTurn, panels += kTurn * kPanelOutputs) {
      if (k % kLine == 0) {
        const bool direct = apart_ && k + kLine <= end;
        rows = direct ? w_.codes + outputs_[0] * w_.depth + k : lines;
        stride = direct ? w_.depth : kLine;
        if (!direct) Copy(k, lines);
      }
      if constexpr (Scaled)
        if (k == (group + 1) * w_.group_depth) Scales(++group, scales);
      for (int i = 0; i < kDecoded; i += kTurn) {
        Pairs pairs[kPairs];
        TurnCodes(rows + i * stride, stride, pairs);
        float* to = panels + i / kPanelOutputs * kFloat8Chunk * kPanelOutputs + i % kPanelOutputs;
        Unroll<kPairs>([&](auto pair) ONNXQ_INLINE_LAMBDA {
          constexpr int j = decltype(pair)::value;
          Store(pairs[j] << uint16_t(8), scales + i, to + 2 * j * kPanelOutputs);
          Store(pairs[j], scales + i, to + (2 * j + 1) * kPanelOutputs);
        });
      }
    }
  }

 private:
  /// lines [kDecoded][kLine]: inputs from k on, zero beyond the last.
  ONNXQ_INLINE void Copy(int64_t k, uint8_t* lines) const {
    const int64_t count = Min<int64_t>(kLine, w_.depth - k);
    for (int i = 0; i < kDecoded; ++i, lines += kLine) {
      const uint8_t* from = w_.codes + outputs_[i] * w_.depth + k;
      if (count == kLine) {
        __builtin_memcpy(lines, from, kLine);
      } else {
        for (int64_t j = 0; j < kLine; ++j) lines[j] = j < count ? from[j] : 0;
      }
    }
  }

  /// One input of kTurn outputs.
  static ONNXQ_INLINE void Store(const Pairs& codes, const float* scales, float* to) {
    Isa::Floats values[kTurn / Isa::kLanes];
    UpperValues<MantissaBits>(codes, values);
    Unroll<kTurn / Isa::kLanes>([&](auto vector) ONNXQ_INLINE_LAMBDA {
      constexpr int i = decltype(vector)::value * Isa::kLanes;
      Isa::Floats value = values[decltype(vector)::value];
      if constexpr (Scaled) value = Isa::Mul(value, Isa::LoadFloats(scales + i));
      // A panel may be narrower than what is turned.
      Isa::StoreFloats(to + i / kPanelOutputs * kFloat8Chunk * kPanelOutputs + i % kPanelOutputs, value);
    });
  }

  const Float8Weight& w_;
  const bool apart_;  // all outputs exist, and their rows don't displace each other in the cache
  int64_t outputs_[kDecoded];
};

/// The codes that are decoded next. They are asked for while their predecessors are multiplied: the processor
/// itself does not look ahead on so many rows.
struct NextCodes {
  const uint8_t* codes;
  int64_t stride;
  int64_t lines;  ///< of all rows
  int64_t share;  ///< what Fetch asks for at a time

  ONNXQ_INLINE NextCodes(const Float8Weight& w, int64_t first, int64_t k, int64_t parts)
      : codes(w.codes + first * w.depth + k),
        stride(w.depth),
        lines(Min<int64_t>(kDecoded, w.outputs - first) * kLines),
        share((lines + parts - 1) / parts) {}

  ONNXQ_INLINE void Fetch(int64_t part) const {
    const int64_t end = Min((part + 1) * share, lines);
    for (int64_t line = part * share; line < end; ++line)
      __builtin_prefetch(codes + line / kLines * stride + line % kLines * kLine, 0, 2);
  }

 private:
  static constexpr int64_t kLines = kFloat8Chunk / kLine;
};

/// What the sums of one panel begin and end with.
struct PanelEnds {
  bool fresh;  ///< from zero, not from what lies in y
  bool last;   ///< times scales, plus bias
  alignas(64) float scales[kPanelOutputs];
  alignas(64) float bias[kPanelOutputs];
};

/// y [Rows][kPanelOutputs], rows y_stride apart: sums over one chunk of a strip [depth][Rows] and a panel
/// [depth][kPanelOutputs]; depth is whole kFloat8Step.
template <int Rows>
ONNXQ_NOINLINE void MultiplyStrip(const float* strip, const float* panel, int64_t depth,
                                  const PanelEnds& ends, float* y, int64_t y_stride) {
  constexpr int kVectors = Isa::kFloatVectors;
  Isa::Floats acc[Rows][kVectors];
  EachSum<Rows, kVectors>([&](int r, int i) ONNXQ_INLINE_LAMBDA {
    acc[r][i] = ends.fresh ? Isa::ZeroFloats() : Isa::LoadFloats(y + r * y_stride + i * Isa::kLanes);
  });
  // Of the strip that follows, each step asks for as much as it reads of this one.
  const float* next = strip + depth * Rows;
  for (int64_t k = 0; k < depth; k += kFloat8Step) {
    Unroll<(Rows * kFloat8Step * 4 + kLine - 1) / kLine>([&](auto line) ONNXQ_INLINE_LAMBDA {
      __builtin_prefetch(next + decltype(line)::value * (kLine / 4));
    });
    Unroll<kFloat8Step>([&](auto input) ONNXQ_INLINE_LAMBDA {
      constexpr int j = decltype(input)::value;
      Isa::Floats b[kVectors];
      Unroll<kVectors>([&](auto vector) ONNXQ_INLINE_LAMBDA {
        constexpr int i = decltype(vector)::value;
        b[i] = Isa::LoadFloats(panel + j * kPanelOutputs + i * Isa::kLanes);
      });
      Unroll<Rows>([&](auto row) ONNXQ_INLINE_LAMBDA {
        constexpr int r = decltype(row)::value;
        const Isa::Floats a = Isa::Broadcast(strip[j * Rows + r]);
        Unroll<kVectors>([&](auto vector) ONNXQ_INLINE_LAMBDA {
          constexpr int i = decltype(vector)::value;
          acc[r][i] = Isa::MulAdd(a, b[i], acc[r][i]);
        });
      });
    });
    strip += Rows * kFloat8Step;
    next += Rows * kFloat8Step;
    panel += kFloat8Step * kPanelOutputs;
  }
  EachSum<Rows, kVectors>([&](int r, int i) ONNXQ_INLINE_LAMBDA {
    Isa::Floats sum = acc[r][i];
    if (ends.last)
      sum = Isa::MulAdd(sum, Isa::LoadFloats(ends.scales + i * Isa::kLanes),
                        Isa::LoadFloats(ends.bias + i * Isa::kLanes));
    Isa::StoreFloats(y + r * y_stride + i * Isa::kLanes, sum);
  });
}

/// The same for a panel of which only `count` outputs exist.
template <int Rows>
ONNXQ_NOINLINE void MultiplyEdge(const float* strip, const float* panel, int64_t depth, const PanelEnds& ends,
                                 int64_t count, float* y, int64_t y_stride) {
  alignas(64) float sums[Rows * kPanelOutputs] = {};
  if (!ends.fresh)
    for (int r = 0; r < Rows; ++r)
      for (int64_t i = 0; i < count; ++i) sums[r * kPanelOutputs + i] = y[r * y_stride + i];
  MultiplyStrip<Rows>(strip, panel, depth, ends, sums, kPanelOutputs);
  for (int r = 0; r < Rows; ++r)
    for (int64_t i = 0; i < count; ++i) y[r * y_stride + i] = sums[r * kPanelOutputs + i];
}

/// y [rows, count], rows y_stride apart: one chunk of all strips times a panel.
ONNXQ_INLINE void MultiplyPanel(const Float8Strips& strips, const float* x, const float* panel, int64_t depth,
                                const PanelEnds& ends, const NextCodes& next, int64_t count, float* y,
                                int64_t y_stride) {
  for (int64_t s = 0; s < strips.count; ++s) {
    next.Fetch(s);
    const int64_t row = strips.begin(s);
    WithCount<Isa::kFloatRows>(strips.begin(s + 1) - row, [&](auto rows) ONNXQ_INLINE_LAMBDA {
      constexpr int kRows = decltype(rows)::value;
      if (count == kPanelOutputs)
        MultiplyStrip<kRows>(x + row * depth, panel, depth, ends, y + row * y_stride, y_stride);
      else
        MultiplyEdge<kRows>(x + row * depth, panel, depth, ends, count, y + row * y_stride, y_stride);
    });
  }
}

template <int MantissaBits, bool Scaled>
ONNXQ_NOINLINE void MultiplyRange(const Float8Weight& w, const float* x, const Range& range,
                                  const Output& out) {
  alignas(64) float panels[kDecoded * kFloat8Chunk];
  const Float8Strips strips(range.row_end - range.row_begin, Isa::kFloatRows);
  const int64_t first = range.tile_begin * kTileOutputs, last = Min(range.tile_end * kTileOutputs, w.outputs);
  x += range.row_begin * Float8Strips::Depth(w.depth);
  float* y = out.y + range.row_begin * out.stride;
  for (int64_t k = 0; k < w.depth; k += kFloat8Chunk) {
    const int64_t end = Min(k + kFloat8Chunk, w.depth), depth = Float8Strips::Depth(end - k);
    for (int64_t n = first; n < last; n += kDecoded) {
      const Panels<MantissaBits, Scaled> decoder(w, n);
      decoder.Decode(k, end, panels);
      alignas(64) float scales[kDecoded];
      if constexpr (!Scaled) decoder.Scales(0, scales);
      // Behind the range's last output: its next chunk, or what the task that follows begins with.
      const bool back = n + kDecoded >= last, more = end < w.depth;
      const int64_t next_k = !back ? k : more ? end : 0;
      const NextCodes next(w, Min(back && more ? first : n + kDecoded, w.outputs - 1), next_k, strips.count);
      for (int64_t i = 0; i < kDecoded && n + i < last; i += kPanelOutputs) {
        const int64_t count = Min<int64_t>(kPanelOutputs, last - n - i);
        PanelEnds ends{.fresh = k == 0, .last = end == w.depth, .scales = {}, .bias = {}};
        for (int64_t j = 0; j < count; ++j) {
          ends.scales[j] = Scaled ? w.gain : w.gain * scales[i + j];
          ends.bias[j] = w.bias[w.shared_bias ? 0 : n + i + j];
        }
        MultiplyPanel(strips, x, panels + i * kFloat8Chunk, depth, ends, next, count, y + n + i, out.stride);
      }
    }
    x += strips.rows * depth;
  }
}

template <int MantissaBits>
void ManyRows(const Float8Weight& w, const float* x, const Range& range, const Output& out) {
  // One scale for an output: its sum may be scaled instead of every weight.
  return w.groups == 1 ? MultiplyRange<MantissaBits, false>(w, x, range, out)
                       : MultiplyRange<MantissaBits, true>(w, x, range, out);
}
