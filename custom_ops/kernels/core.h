// The kernels, written once over a vector trait `Isa` and compiled once per ISA.
//
// Included inside an anonymous namespace after the trait; uses no standard-library function, because an
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

template <int Bits>
struct Limbs {
  static constexpr int kCount = Bits <= Isa::kDirectBits ? 1 : 2;
  static constexpr int kWidth = kCount == 1 ? Bits : 4;
  /// Dot products that a Partial takes before it must be moved on: 1, 2, 4, 8 (one block) or a whole segment.
  static constexpr int kDepth = Isa::Depth(kWidth);
  static_assert(kDepth <= kQuads || kDepth >= kMaxActivationBlock / 4,
                "a flush belongs to a block or a segment");
};

/// Whether several rows multiply codes this wide in 16 bits: there, a byte product would have to be moved on
/// each time.
template <int Bits>
constexpr bool kWide = Bits >= Isa::kWideBits;

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

// ---- activations ------------------------------------------------------------------------------------------

/// The 32 floats of block `b` of a row, from a zero-padded copy when K ends inside it.
ONNXQ_INLINE const float* PaddedBlock(const float* x, int64_t b, int64_t depth, float* copy) {
  const int64_t left = depth - b * kBlockDepth;
  if (left >= kBlockDepth) return x + b * kBlockDepth;
  for (int64_t i = 0; i < kBlockDepth; ++i) copy[i] = i < left ? x[b * kBlockDepth + i] : 0.0f;
  return copy;
}

void QuantizeRow(const Weight& w, const float* x, int8_t* codes, float* scales, float* scaled_sum) {
  // Below this the reciprocal overflows; such inputs are worth nothing beside a float32 sum.
  constexpr float kTiny = 1e-30f;
  alignas(64) float copy[kBlockDepth];
  int32_t activation = -1;
  float scale = 0.0f;
  float inverse = 0.0f;
  for (int64_t s = 0; s < w.segment_count; ++s) {
    const Segment& segment = w.segments[s];
    if (segment.activation != activation) {
      activation = segment.activation;
      const int64_t begin = activation * w.activation_depth;
      const int64_t end = Min(begin + w.activation_depth, w.blocks);
      float largest = 0.0f;
      float poison = 0.0f;  // becomes NaN when an input is NaN or infinite, which a maximum may not show
      for (int64_t b = begin; b < end; ++b) Isa::AbsMax32(PaddedBlock(x, b, w.depth, copy), largest, poison);
      scale = largest / 127.0f + poison;
      inverse = largest > kTiny ? 127.0f / largest : 0.0f;
    }
    int32_t sum = 0;
    for (int64_t b = segment.block; b < segment.block + segment.blocks; ++b)
      sum += Isa::Quantize32(PaddedBlock(x, b, w.depth, copy), inverse, codes + b * kBlockDepth);
    scales[s] = scale;
    scaled_sum[s] = scale * float(sum);
  }
}

// ---- one row, int8 activations ----------------------------------------------------------------------------

template <int Bits, bool kSharedZero>
void GemvInt8(const Weight& w, const QuantizedRows& rows, const Range& range, float* y) {
  using L = Limbs<Bits>;
  constexpr int kVectors = Isa::kGemvVectors / L::kCount;
  constexpr int64_t kBlockBytes = int64_t(Bits) * kRowBytes;
  [[maybe_unused]] const float shared_zero = kSharedZero ? SharedZero(w) : 0.0f;
  [[maybe_unused]] const Isa::Floats fraction = Isa::Broadcast(1.0f / float(1 << (8 - Bits)));
  for (int64_t tile = range.tile_begin; tile < range.tile_end; ++tile) {
    alignas(64) float result[kTileOutputs];
    for (int first = 0; first < kTileVectors; first += kVectors) {
      const uint8_t* block = w.packed + tile * w.blocks * kBlockBytes + first * kVectorBytes;
      const int8_t* x = rows.codes;
      Isa::Floats acc[kVectors];
      for (int i = 0; i < kVectors; ++i) acc[i] = Isa::ZeroFloats();
      for (int64_t s = 0; s < w.segment_count; ++s) {
        const Segment& segment = w.segments[s];
        Isa::Ints total[kVectors];
        Isa::Partial partial[L::kCount][kVectors];
        for (int i = 0; i < kVectors; ++i) total[i] = Isa::ZeroInts();
        for (int l = 0; l < L::kCount; ++l)
          for (int i = 0; i < kVectors; ++i) partial[l][i] = Isa::ZeroPartial();
        const auto flush = [&]() ONNXQ_INLINE_LAMBDA {
          Unroll<L::kCount>([&](auto limb) ONNXQ_INLINE_LAMBDA {
            constexpr int l = decltype(limb)::value;
            for (int i = 0; i < kVectors; ++i) {
              total[i] = Isa::template Collect<(l == 0 ? 1 : 16)>(total[i], partial[l][i]);
              partial[l][i] = Isa::ZeroPartial();
            }
          });
        };
        for (int32_t b = 0; b < segment.blocks; ++b) {
          Unroll<kQuads>([&](auto index) ONNXQ_INLINE_LAMBDA {
            constexpr int q = decltype(index)::value;
            const Isa::Bytes quad = Isa::Quad(x + 4 * q);
            Unroll<kVectors>([&](auto vector) ONNXQ_INLINE_LAMBDA {
              constexpr int i = decltype(vector)::value;
              Unroll<L::kCount>([&](auto limb) ONNXQ_INLINE_LAMBDA {
                constexpr int l = decltype(limb)::value;
                constexpr int width = L::kCount == 1 ? Bits : (l == 0 ? 4 : Bits - 4);
                const Isa::Bytes codes = Codes<Bits, 4 * l, width, q>(block + i * kVectorBytes);
                partial[l][i] = Isa::Dot(partial[l][i], codes, quad);
              });
            });
            if constexpr (L::kDepth <= kQuads && (q + 1) % L::kDepth == 0) flush();
          });
          block += kBlockBytes;
          x += kBlockDepth;
        }
        if constexpr (L::kDepth > kQuads) flush();
        const uint16_t* scales = w.scales + (tile * w.groups + segment.group) * kTileOutputs;
        [[maybe_unused]] const uint8_t* zeros = w.zeros + (tile * w.groups + segment.group) * kTileOutputs;
        const Isa::Floats scale = Isa::Broadcast(rows.scales[s]);
        for (int i = 0; i < kVectors; ++i) {
          const int at = (first + i) * Isa::kLanes;
          Isa::Floats value;
          if constexpr (kSharedZero) {
            value =
                Isa::MulSub(Isa::ToFloats(total[i]), scale, Isa::Broadcast(rows.scaled_sum[s] * shared_zero));
          } else {
            const Isa::Floats zero = Isa::Mul(Isa::LoadByteFloats(zeros + at), fraction);
            value = Isa::Mul(Isa::ToFloats(total[i]), scale);
            value = Isa::NegMulAdd(zero, Isa::Broadcast(rows.scaled_sum[s]), value);
          }
          acc[i] = Isa::MulAdd(value, Isa::LoadHalfFloats(scales + at), acc[i]);
        }
      }
      for (int i = 0; i < kVectors; ++i) Isa::StoreFloats(result + (first + i) * Isa::kLanes, acc[i]);
    }
    Finish(w, tile, result, y + range.row_begin * w.outputs);
  }
}

template <int Bits>
void GemvInt8(const Weight& w, const QuantizedRows& rows, const Range& range, float* y) {
  w.shared_zero ? GemvInt8<Bits, true>(w, rows, range, y) : GemvInt8<Bits, false>(w, rows, range, y);
}

// ---- several rows, int8 activations: unpack a stretch of a tile once, use it for every row
// ---------------------

constexpr int kChunkBlocks = 16;  // 512 inputs: 16 KiB of unpacked codes stay in the first-level cache
constexpr int kMaxLimbs = 2;

struct Int8Stripe {
  /// Limbs, or codes of even and odd inputs as 16 bits (kWide).
  alignas(64) uint8_t codes[kMaxLimbs][kChunkBlocks * kBlockDepth * kTileOutputs];
  alignas(64) float scales[kChunkBlocks][kTileOutputs];
  alignas(64) float zeros[kChunkBlocks][kTileOutputs];  // scale * zero point
};

template <int Bits>
void UnpackStripe(const Weight& w, int64_t tile, int64_t s_begin, int64_t s_end, Int8Stripe& stripe) {
  using L = Limbs<Bits>;
  const int64_t b_begin = w.segments[s_begin].block;
  const int64_t b_end = w.segments[s_end - 1].block + w.segments[s_end - 1].blocks;
  for (int64_t b = b_begin; b < b_end; ++b) {
    const uint8_t* block = w.packed + (tile * w.blocks + b) * Bits * kRowBytes;
    const int64_t to = (b - b_begin) * kQuads * kRowBytes;
    for (int i = 0; i < kTileVectors; ++i) {
      Unroll<kQuads>([&](auto index) ONNXQ_INLINE_LAMBDA {
        constexpr int q = decltype(index)::value;
        const int64_t at = to + q * kRowBytes + i * kVectorBytes;
        if constexpr (kWide<Bits>) {
          const Isa::Bytes code = Codes<Bits, 0, Bits, q>(block + i * kVectorBytes);
          Isa::Store(stripe.codes[0] + at, Isa::template And<0x00ff00ffu>(code));
          Isa::Store(stripe.codes[1] + at, Isa::template And<0x00ff00ffu>(Isa::template Shift<8>(code)));
        } else {
          Unroll<L::kCount>([&](auto limb) ONNXQ_INLINE_LAMBDA {
            constexpr int l = decltype(limb)::value;
            constexpr int width = L::kCount == 1 ? Bits : (l == 0 ? 4 : Bits - 4);
            Isa::Store(stripe.codes[l] + at, Codes<Bits, 4 * l, width, q>(block + i * kVectorBytes));
          });
        }
      });
    }
  }
  const Isa::Floats fraction = Isa::Broadcast(1.0f / float(1 << (8 - Bits)));
  const Isa::Floats shared = Isa::Broadcast(w.shared_zero ? SharedZero(w) : 0.0f);
  for (int64_t s = s_begin; s < s_end; ++s) {
    const int64_t group = (tile * w.groups + w.segments[s].group) * kTileOutputs;
    for (int at = 0; at < kTileOutputs; at += Isa::kLanes) {
      const Isa::Floats scale = Isa::LoadHalfFloats(w.scales + group + at);
      const Isa::Floats zero =
          w.shared_zero ? shared : Isa::Mul(Isa::LoadByteFloats(w.zeros + group + at), fraction);
      Isa::StoreFloats(stripe.scales[s - s_begin] + at, scale);
      Isa::StoreFloats(stripe.zeros[s - s_begin] + at, Isa::Mul(scale, zero));
    }
  }
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

/// Takes the integer sums of one segment into sums [Rows][32]: scales, and zero points by the sum of the
/// inputs.
template <int Rows>
ONNXQ_INLINE void AddSegment(const Isa::Ints (&total)[Rows][Isa::kGemmVectors], const Weight& w,
                             const Int8Stripe& stripe, int64_t s, int64_t s_begin, const QuantizedRows& rows,
                             int64_t row, int first, float* sums) {
  EachSum<Rows, Isa::kGemmVectors>([&](int r, int i) ONNXQ_INLINE_LAMBDA {
    const int64_t side = (row + r) * w.segment_count + s;
    const int at = (first + i) * Isa::kLanes;
    float* to = sums + r * kTileOutputs + at;
    Isa::Floats acc = Isa::NegMulAdd(Isa::Broadcast(rows.scaled_sum[side]),
                                     Isa::LoadFloats(stripe.zeros[s - s_begin] + at), Isa::LoadFloats(to));
    acc = Isa::MulAdd(Isa::Mul(Isa::ToFloats(total[r][i]), Isa::Broadcast(rows.scales[side])),
                      Isa::LoadFloats(stripe.scales[s - s_begin] + at), acc);
    Isa::StoreFloats(to, acc);
  });
}

/// Adds `Rows` rows times the stripe into sums [Rows][32]. Not inlined: every bit width shares the one copy.
template <int LimbCount, int Depth, int Rows>
ONNXQ_NOINLINE void Int8Rows(const Weight& w, const Int8Stripe& stripe, int64_t s_begin, int64_t s_end,
                             const QuantizedRows& rows, int64_t row, float* sums) {
  constexpr int kVectors = Isa::kGemmVectors;
  const int64_t row_bytes = w.blocks * kBlockDepth;
  const int64_t b_begin = w.segments[s_begin].block;
  for (int64_t s = s_begin; s < s_end; ++s) {
    const Segment& segment = w.segments[s];
    const int8_t* x = rows.codes + row * row_bytes + segment.block * kBlockDepth;
    const int64_t from = (segment.block - b_begin) * kQuads * kRowBytes;
    for (int first = 0; first < kTileVectors; first += kVectors) {
      Isa::Ints total[Rows][kVectors];
      EachSum<Rows, kVectors>([&](int r, int i) ONNXQ_INLINE_LAMBDA { total[r][i] = Isa::ZeroInts(); });
      Unroll<LimbCount>([&](auto limb) ONNXQ_INLINE_LAMBDA {
        constexpr int l = decltype(limb)::value;
        Isa::Partial partial[Rows][kVectors];
        EachSum<Rows, kVectors>([&](int r, int i)
                                    ONNXQ_INLINE_LAMBDA { partial[r][i] = Isa::ZeroPartial(); });
        const auto flush = [&]() ONNXQ_INLINE_LAMBDA {
          EachSum<Rows, kVectors>([&](int r, int i) ONNXQ_INLINE_LAMBDA {
            total[r][i] = Isa::template Collect<(l == 0 ? 1 : 16)>(total[r][i], partial[r][i]);
            partial[r][i] = Isa::ZeroPartial();
          });
        };
        const uint8_t* codes = stripe.codes[l] + from + first * kVectorBytes;
        const int8_t* x_block = x;
        for (int32_t b = 0; b < segment.blocks; ++b) {
          Unroll<kQuads>([&](auto index) ONNXQ_INLINE_LAMBDA {
            constexpr int q = decltype(index)::value;
            Isa::Bytes code[kVectors];
            Unroll<kVectors>([&](auto vector) ONNXQ_INLINE_LAMBDA {
              constexpr int i = decltype(vector)::value;
              code[i] = Isa::Load(codes + q * kRowBytes + i * kVectorBytes);
            });
            Unroll<Rows>([&](auto index_of_row) ONNXQ_INLINE_LAMBDA {
              constexpr int r = decltype(index_of_row)::value;
              const Isa::Bytes quad = Isa::Quad(x_block + r * row_bytes + 4 * q);
              Unroll<kVectors>([&](auto vector) ONNXQ_INLINE_LAMBDA {
                constexpr int i = decltype(vector)::value;
                partial[r][i] = Isa::Dot(partial[r][i], code[i], quad);
              });
            });
            if constexpr (Depth <= kQuads && (q + 1) % Depth == 0) flush();
          });
          codes += kQuads * kRowBytes;
          x_block += kBlockDepth;
        }
        if constexpr (Depth > kQuads) flush();
      });
      AddSegment<Rows>(total, w, stripe, s, s_begin, rows, row, first, sums);
    }
  }
}

/// The same for codes that are multiplied in 16 bits, whose products need no limbs and no moving on. `I` is
/// Isa, as a parameter, because only a trait with kWideBits in reach has what this needs.
template <int Rows, class I = Isa>
ONNXQ_NOINLINE void WideRows(const Weight& w, const Int8Stripe& stripe, int64_t s_begin, int64_t s_end,
                             const QuantizedRows& rows, int64_t row, float* sums) {
  constexpr int kVectors = Isa::kGemmVectors;
  // Inputs 0 and 2, and inputs 1 and 3, of every quad as a pair of int16.
  alignas(64) int32_t even[Rows][kChunkBlocks * kQuads];
  alignas(64) int32_t odd[Rows][kChunkBlocks * kQuads];
  const int64_t row_bytes = w.blocks * kBlockDepth;
  const int64_t b_begin = w.segments[s_begin].block;
  const int64_t blocks = w.segments[s_end - 1].block + w.segments[s_end - 1].blocks - b_begin;
  for (int r = 0; r < Rows; ++r)
    for (int64_t b = 0; b < blocks; ++b)
      I::Widen32(rows.codes + (row + r) * row_bytes + (b_begin + b) * kBlockDepth, even[r] + b * kQuads,
                 odd[r] + b * kQuads);
  for (int64_t s = s_begin; s < s_end; ++s) {
    const Segment& segment = w.segments[s];
    for (int first = 0; first < kTileVectors; first += kVectors) {
      Isa::Ints total[Rows][kVectors];
      EachSum<Rows, kVectors>([&](int r, int i) ONNXQ_INLINE_LAMBDA { total[r][i] = Isa::ZeroInts(); });
      int64_t quad = (segment.block - b_begin) * kQuads;
      const int64_t end = quad + segment.blocks * kQuads;
      for (; quad < end; ++quad) {
        const auto half = [&](const auto& x, const uint8_t* codes) ONNXQ_INLINE_LAMBDA {
          Isa::Bytes code[kVectors];
          Unroll<kVectors>([&](auto vector) ONNXQ_INLINE_LAMBDA {
            constexpr int i = decltype(vector)::value;
            code[i] = Isa::Load(codes + quad * kRowBytes + (first * kVectorBytes + i * kVectorBytes));
          });
          Unroll<Rows>([&](auto index_of_row) ONNXQ_INLINE_LAMBDA {
            constexpr int r = decltype(index_of_row)::value;
            const Isa::Bytes pair = I::Pair(x[r][quad]);
            Unroll<kVectors>([&](auto vector) ONNXQ_INLINE_LAMBDA {
              constexpr int i = decltype(vector)::value;
              total[r][i] = I::DotWide(total[r][i], code[i], pair);
            });
          });
        };
        half(even, stripe.codes[0]);
        half(odd, stripe.codes[1]);
      }
      AddSegment<Rows>(total, w, stripe, s, s_begin, rows, row, first, sums);
    }
  }
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

template <int Bits>
void GemmInt8(const Weight& w, const QuantizedRows& rows, const Range& range, float* y) {
  using L = Limbs<Bits>;
  Int8Stripe stripe;
  alignas(64) float sums[Isa::kGemmRows * kTileOutputs];
  for (int64_t s_begin = 0; s_begin < w.segment_count;) {
    int64_t s_end = s_begin;
    int64_t blocks = 0;
    while (s_end < w.segment_count && blocks + w.segments[s_end].blocks <= kChunkBlocks)
      blocks += w.segments[s_end++].blocks;
    for (int64_t tile = range.tile_begin; tile < range.tile_end; ++tile) {
      UnpackStripe<Bits>(w, tile, s_begin, s_end, stripe);
      for (int64_t row = range.row_begin; row < range.row_end;) {
        constexpr int kRowsAtOnce = kWide<Bits> ? Isa::kWideRows : Isa::kGemmRows;
        WithCount<kRowsAtOnce>(range.row_end - row, [&](auto count) ONNXQ_INLINE_LAMBDA {
          constexpr int kRows = decltype(count)::value;
          LoadSums(w, tile, kRows, s_begin == 0, y + row * w.outputs, sums);
          if constexpr (kWide<Bits>) {
            WideRows<kRows>(w, stripe, s_begin, s_end, rows, row, sums);
          } else {
            Int8Rows<L::kCount, L::kDepth, kRows>(w, stripe, s_begin, s_end, rows, row, sums);
          }
          StoreSums(w, tile, kRows, s_end == w.segment_count, sums, y + row * w.outputs);
          row += kRows;
        });
      }
    }
    s_begin = s_end;
  }
}

// ---- float32 activations ----------------------------------------------------------------------------------

template <int Bits>
void GemvF32(const Weight& w, const float* x, const Range& range, float* y) {
  constexpr int64_t kBlockBytes = int64_t(Bits) * kRowBytes;
  const Isa::Floats fraction = Isa::Broadcast(1.0f / float(1 << (8 - Bits)));
  const Isa::Floats shared = Isa::Broadcast(w.shared_zero ? SharedZero(w) : 0.0f);
  for (int64_t tile = range.tile_begin; tile < range.tile_end; ++tile) {
    alignas(64) float result[kTileOutputs];
    const uint8_t* block = w.packed + tile * w.blocks * kBlockBytes;
    Isa::Floats acc[kTileVectors];
    for (int i = 0; i < kTileVectors; ++i) acc[i] = Isa::ZeroFloats();
    for (int64_t b = 0; b < w.blocks;) {
      const int64_t group = b / w.group_blocks;
      const int64_t end = Min((group + 1) * w.group_blocks, w.blocks);
      // Sums of code * x and of x; the zero point is taken off once a group.
      Isa::Floats dot[kTileVectors];
      Isa::Floats sum = Isa::ZeroFloats();
      for (int i = 0; i < kTileVectors; ++i) dot[i] = Isa::ZeroFloats();
      for (; b < end; ++b) {
        Unroll<kQuads>([&](auto index) ONNXQ_INLINE_LAMBDA {
          constexpr int q = decltype(index)::value;
          const float* quad = x + b * kBlockDepth + 4 * q;
          Unroll<4>([&](auto j) ONNXQ_INLINE_LAMBDA { sum = Isa::Add(sum, Isa::Broadcast(quad[j.value])); });
          Unroll<kTileVectors>([&](auto vector) ONNXQ_INLINE_LAMBDA {
            constexpr int i = decltype(vector)::value;
            FloatCodes<Bits, q>(block + i * kVectorBytes, [&](auto j, Isa::Floats codes) ONNXQ_INLINE_LAMBDA {
              dot[i] = Isa::MulAdd(codes, Isa::Broadcast(quad[j.value]), dot[i]);
            });
          });
        });
        block += kBlockBytes;
      }
      const int64_t side = (tile * w.groups + group) * kTileOutputs;
      for (int i = 0; i < kTileVectors; ++i) {
        const int64_t at = side + i * Isa::kLanes;
        const Isa::Floats zero =
            w.shared_zero ? shared : Isa::Mul(Isa::LoadByteFloats(w.zeros + at), fraction);
        acc[i] = Isa::MulAdd(Isa::NegMulAdd(zero, sum, dot[i]), Isa::LoadHalfFloats(w.scales + at), acc[i]);
      }
    }
    for (int i = 0; i < kTileVectors; ++i) Isa::StoreFloats(result + i * Isa::kLanes, acc[i]);
    Finish(w, tile, result, y + range.row_begin * w.outputs);
  }
}

constexpr int kFloatChunkBlocks = 8;  // 256 inputs: a panel of 16 outputs takes 16 KiB
constexpr int kPanelOutputs = Isa::kFloatVectors * Isa::kLanes;
constexpr int kPanels = kTileOutputs / kPanelOutputs;

template <int Bits>
void DequantizeStripe(const Weight& w, int64_t tile, int64_t b_begin, int64_t b_end, float* stripe) {
  const Isa::Floats fraction = Isa::Broadcast(1.0f / float(1 << (8 - Bits)));
  const Isa::Floats shared = Isa::Broadcast(w.shared_zero ? SharedZero(w) : 0.0f);
  for (int64_t b = b_begin; b < b_end; ++b) {
    const int64_t side = (tile * w.groups + b / w.group_blocks) * kTileOutputs;
    for (int i = 0; i < kTileVectors; ++i) {
      const uint8_t* block = w.packed + (tile * w.blocks + b) * Bits * kRowBytes + i * kVectorBytes;
      const int64_t at = side + i * Isa::kLanes;
      const Isa::Floats scale = Isa::LoadHalfFloats(w.scales + at);
      const Isa::Floats zero = w.shared_zero ? shared : Isa::Mul(Isa::LoadByteFloats(w.zeros + at), fraction);
      const int panel = i / Isa::kFloatVectors;
      float* to = stripe + panel * kFloatChunkBlocks * kBlockDepth * kPanelOutputs +
                  (b - b_begin) * kBlockDepth * kPanelOutputs + (i % Isa::kFloatVectors) * Isa::kLanes;
      Unroll<kQuads>([&](auto index) ONNXQ_INLINE_LAMBDA {
        constexpr int q = decltype(index)::value;
        FloatCodes<Bits, q>(block, [&](auto j, Isa::Floats codes) ONNXQ_INLINE_LAMBDA {
          Isa::StoreFloats(to + (4 * q + j.value) * kPanelOutputs, Isa::Mul(Isa::Sub(codes, zero), scale));
        });
      });
    }
  }
}

/// sums [Rows][32] += x [Rows, depth] (rows `stride` apart) times panel [depth][kPanelOutputs].
template <int Rows>
ONNXQ_NOINLINE void FloatRows(const float* x, int64_t stride, const float* panel, int64_t depth,
                              float* sums) {
  constexpr int kVectors = Isa::kFloatVectors;
  Isa::Floats acc[Rows][kVectors];
  EachSum<Rows, kVectors>([&](int r, int i) ONNXQ_INLINE_LAMBDA {
    acc[r][i] = Isa::LoadFloats(sums + r * kTileOutputs + i * Isa::kLanes);
  });
  const auto step = [&](const float* x_at, const float* panel_at) ONNXQ_INLINE_LAMBDA {
    Isa::Floats b[kVectors];
    Unroll<kVectors>([&](auto vector) ONNXQ_INLINE_LAMBDA {
      constexpr int i = decltype(vector)::value;
      b[i] = Isa::LoadFloats(panel_at + i * Isa::kLanes);
    });
    Unroll<Rows>([&](auto row) ONNXQ_INLINE_LAMBDA {
      constexpr int r = decltype(row)::value;
      const Isa::Floats a = Isa::Broadcast(x_at[r * stride]);
      Unroll<kVectors>([&](auto vector) ONNXQ_INLINE_LAMBDA {
        constexpr int i = decltype(vector)::value;
        acc[r][i] = Isa::MulAdd(a, b[i], acc[r][i]);
      });
    });
  };
  int64_t k = 0;
  for (; k + 4 <= depth; k += 4, x += 4, panel += 4 * kPanelOutputs)
    Unroll<4>([&](auto j) ONNXQ_INLINE_LAMBDA {
      step(x + decltype(j)::value, panel + decltype(j)::value * kPanelOutputs);
    });
  for (; k < depth; ++k, ++x, panel += kPanelOutputs) step(x, panel);
  EachSum<Rows, kVectors>([&](int r, int i) ONNXQ_INLINE_LAMBDA {
    Isa::StoreFloats(sums + r * kTileOutputs + i * Isa::kLanes, acc[r][i]);
  });
}

template <int Bits>
void GemmF32(const Weight& w, const float* x, const Range& range, float* y) {
  alignas(64) float stripe[kFloatChunkBlocks * kBlockDepth * kTileOutputs];
  alignas(64) float sums[Isa::kFloatRows * kTileOutputs];
  for (int64_t b = 0; b < w.blocks; b += kFloatChunkBlocks) {
    const int64_t b_end = Min(b + kFloatChunkBlocks, w.blocks);
    const int64_t k = b * kBlockDepth;
    const int64_t depth = Min(b_end * kBlockDepth, w.depth) - k;
    for (int64_t tile = range.tile_begin; tile < range.tile_end; ++tile) {
      DequantizeStripe<Bits>(w, tile, b, b_end, stripe);
      for (int64_t row = range.row_begin; row < range.row_end;) {
        WithCount<Isa::kFloatRows>(range.row_end - row, [&](auto count) ONNXQ_INLINE_LAMBDA {
          constexpr int kRows = decltype(count)::value;
          LoadSums(w, tile, kRows, b == 0, y + row * w.outputs, sums);
          for (int panel = 0; panel < kPanels; ++panel)
            FloatRows<kRows>(x + row * w.depth + k, w.depth,
                             stripe + panel * kFloatChunkBlocks * kBlockDepth * kPanelOutputs, depth,
                             sums + panel * kPanelOutputs);
          StoreSums(w, tile, kRows, b_end == w.blocks, sums, y + row * w.outputs);
          row += kRows;
        });
      }
    }
  }
}

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
