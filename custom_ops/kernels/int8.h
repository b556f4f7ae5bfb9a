// Products with int8 activations. Included by core.h, once per ISA, inside an anonymous namespace.

template <class Format>
struct Limbs {
  static constexpr int kCount = Format::kLimbs;
  static constexpr int kWidth = kCount == 1 ? Format::kLevelBits : 4;
  /// Dot products that a Partial takes before it must be moved on: 1, 2, 4, 8 (one block) or a whole segment.
  static constexpr int kDepth = Isa::Depth(kWidth);
  static_assert(kDepth <= kQuads || kDepth >= kMaxActivationBlock / 4,
                "a flush belongs to a block or a segment");
  /// Whether several rows multiply levels less `kMiddle`: around zero, twice as many products fit. Products
  /// need levels without a sign, but sums that may wrap and that start at -kMiddle * (their inputs) don't.
  static constexpr bool kCentred = Format::kLevelBits == Isa::kCentredBits;
  static constexpr int kMiddle = kCentred ? onnxq::kernels::kStartMiddle : 0;
  static constexpr int kRowsDepth = kCentred ? kStartQuads : kDepth;
  static_assert(!kCentred || (kDepth == 1 && kMiddle == 1 << (Format::kLevelBits - 1) &&
                              2 * kRowsDepth * kMiddle * 127 < 1 << 15));
};

/// Whether several rows multiply levels this wide in 16 bits: there, a byte product would have to be moved on
/// each time.
template <class Format>
constexpr bool kWide = Format::kLevelBits >= Isa::kWideBits;

// ---- activations ------------------------------------------------------------------------------------------

/// The 32 floats of block `b` of a row, from a zero-padded copy when K ends inside it.
ONNXQ_INLINE const float* PaddedBlock(const float* x, int64_t b, int64_t depth, float* copy) {
  const int64_t left = depth - b * kBlockDepth;
  if (left >= kBlockDepth) return x + b * kBlockDepth;
  for (int64_t i = 0; i < kBlockDepth; ++i) copy[i] = i < left ? x[b * kBlockDepth + i] : 0.0f;
  return copy;
}

/// QuantizedRows::starts of one row. `I` is Isa: see WideRows.
template <class I = Isa>
void SumStarts(const Weight& w, const int8_t* codes, int32_t* starts) {
  if constexpr (I::kCentredBits < I::kWideBits)
    for (int64_t b = 0; b < w.blocks; ++b)
      I::Starts32(codes + b * kBlockDepth, starts + b * kQuads / kStartQuads);
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
      // Of magnitudes as whole numbers, among which infinities and NaNs are the largest: no maximum of floats
      // would show a NaN.
      Isa::Ints top = Isa::ZeroInts();
      for (int64_t b = begin; b < end; ++b) Isa::AbsMax32(PaddedBlock(x, b, w.depth, copy), top);
      const float largest = Isa::LargestFloat(top);
      scale = largest / 127.0f + largest * 0.0f;  // NaN then
      inverse = largest > kTiny ? 127.0f / largest : 0.0f;
    }
    Isa::Ints sum = Isa::ZeroInts();
    for (int64_t b = segment.block; b < segment.block + segment.blocks; ++b)
      Isa::Quantize32(PaddedBlock(x, b, w.depth, copy), inverse, codes + b * kBlockDepth, sum);
    scales[s] = scale;
    scaled_sum[s] = scale * float(Isa::Sum(sum));
  }
}

// ---- one row ----------------------------------------------------------------------------------------------

template <class Format, bool kSharedZero>
void GemvInt8(const Weight& w, const QuantizedRows& rows, const Range& range, const Output& out) {
  using L = Limbs<Format>;
  constexpr int kVectors = Isa::kGemvVectors / L::kCount;
  constexpr int64_t kBlockBytes = int64_t(Format::kBits) * kRowBytes;
  [[maybe_unused]] const float shared_zero = SharedZero<Format>(w);
  [[maybe_unused]] const Isa::Floats fraction = Isa::Broadcast(kZeroUnit<Format>);
  for (int64_t tile = range.tile_begin; tile < range.tile_end; ++tile) {
    alignas(64) float result[kTileOutputs];
    LoadSums(w, tile, range.row_begin, 1, !out.resumes, out, result);
    const Format levels(w, tile);
    for (int first = 0; first < kTileVectors; first += kVectors) {
      int64_t at = first * kVectorBytes;
      const int8_t* x = rows.codes;
      Isa::Floats acc[kVectors];
      for (int i = 0; i < kVectors; ++i) acc[i] = Isa::LoadFloats(result + (first + i) * Isa::kLanes);
      for (int64_t s = 0; s < w.segment_count; ++s) {
        const Segment& segment = w.segments[s];
        Isa::Ints total[kVectors];
        Isa::Partial partial[L::kCount][kVectors];
        for (int i = 0; i < kVectors; ++i) total[i] = Isa::ZeroInts();
        for (int l = 0; l < L::kCount; ++l)
          for (int i = 0; i < kVectors; ++i) partial[l][i] = Isa::ZeroPartial();
        const auto flush = [&](auto limb, int i) ONNXQ_INLINE_LAMBDA {
          constexpr int l = decltype(limb)::value;
          total[i] = Isa::template Collect<(l == 0 ? 1 : 16)>(total[i], partial[l][i]);
          partial[l][i] = Isa::ZeroPartial();
        };
        for (int32_t b = 0; b < segment.blocks; ++b) {
          levels.template Each<kVectors>(
              at, [&](auto quad, auto vector, auto limb, Isa::Bytes codes) ONNXQ_INLINE_LAMBDA {
                constexpr int q = decltype(quad)::value;
                constexpr int i = decltype(vector)::value;
                constexpr int l = decltype(limb)::value;
                partial[l][i] = Isa::Dot(partial[l][i], codes, Isa::Quad(x + 4 * q));
                if constexpr (L::kDepth <= kQuads && (q + 1) % L::kDepth == 0) flush(limb, i);
              });
          at += kBlockBytes;
          x += kBlockDepth;
        }
        if constexpr (L::kDepth > kQuads) {
          Unroll<L::kCount>([&](auto limb) ONNXQ_INLINE_LAMBDA {
            for (int i = 0; i < kVectors; ++i) flush(limb, i);
          });
        }
        const uint16_t* scales = w.scales + (tile * w.groups + segment.group) * kTileOutputs;
        [[maybe_unused]] const uint8_t* zeros = w.zeros + (tile * w.groups + segment.group) * kTileOutputs;
        const Isa::Floats scale = Isa::Broadcast(rows.scales[s]);
        for (int i = 0; i < kVectors; ++i) {
          const int lane = (first + i) * Isa::kLanes;
          Isa::Floats value;
          if constexpr (kSharedZero) {
            value =
                Isa::MulSub(Isa::ToFloats(total[i]), scale, Isa::Broadcast(rows.scaled_sum[s] * shared_zero));
          } else {
            const Isa::Floats zero = Isa::Mul(Isa::LoadByteFloats(zeros + lane), fraction);
            value = Isa::Mul(Isa::ToFloats(total[i]), scale);
            value = Isa::NegMulAdd(zero, Isa::Broadcast(rows.scaled_sum[s]), value);
          }
          acc[i] = Isa::MulAdd(value, Isa::LoadHalfFloats(scales + lane), acc[i]);
        }
      }
      for (int i = 0; i < kVectors; ++i) Isa::StoreFloats(result + (first + i) * Isa::kLanes, acc[i]);
    }
    StoreSums(w, tile, range.row_begin, 1, !out.unfinished, result, out);
  }
}

template <class Format>
void GemvInt8(const Weight& w, const QuantizedRows& rows, const Range& range, const Output& out) {
  w.shared_zero ? GemvInt8<Format, true>(w, rows, range, out) : GemvInt8<Format, false>(w, rows, range, out);
}

// ---- several rows: unpack a stretch of a tile once, use it for every row ----------------------------------

constexpr int kChunkBlocks = 16;  // 512 inputs: 16 KiB of unpacked codes stay in the first-level cache
constexpr int kMaxLimbs = 2;

struct Int8Stripe {
  /// Limbs, or codes of even and odd inputs as 16 bits (kWide).
  alignas(64) uint8_t codes[kMaxLimbs][kChunkBlocks * kBlockDepth * kTileOutputs];
  alignas(64) float scales[kChunkBlocks][kTileOutputs];
  alignas(64) float zeros[kChunkBlocks][kTileOutputs];  // scale * (zero point - kMiddle)
};

template <class Format>
ONNXQ_NOINLINE void UnpackStripe(const Weight& w, int64_t tile, int64_t s_begin, int64_t s_end,
                                 Int8Stripe& stripe) {
  using L = Limbs<Format>;
  const Format levels(w, tile);
  const int64_t b_begin = w.segments[s_begin].block;
  const int64_t b_end = w.segments[s_end - 1].block + w.segments[s_end - 1].blocks;
  for (int64_t b = b_begin; b < b_end; ++b) {
    const int64_t from = b * Format::kBits * kRowBytes;
    const int64_t to = (b - b_begin) * kQuads * kRowBytes;
    for (int i = 0; i < kTileVectors; ++i) {
      const auto place = [&](auto quad)
                             ONNXQ_INLINE_LAMBDA { return to + quad.value * kRowBytes + i * kVectorBytes; };
      if constexpr (kWide<Format>) {
        levels.template Each<1, 1>(
            from + i * kVectorBytes, [&](auto quad, auto, auto, Isa::Bytes codes) ONNXQ_INLINE_LAMBDA {
              const Isa::Bytes odd = Isa::template Shift<8>(codes);
              Isa::Store(stripe.codes[0] + place(quad), Isa::template And<0x00ff00ffu>(codes));
              Isa::Store(stripe.codes[1] + place(quad), Isa::template And<0x00ff00ffu>(odd));
            });
      } else {
        levels.template Each<1>(from + i * kVectorBytes,
                                [&](auto quad, auto, auto limb, Isa::Bytes codes) ONNXQ_INLINE_LAMBDA {
                                  Isa::Store(stripe.codes[limb.value] + place(quad), codes);
                                });
      }
    }
  }
  const Isa::Floats fraction = Isa::Broadcast(kZeroUnit<Format>);
  const Isa::Floats shared = Isa::Broadcast(SharedZero<Format>(w));
  const Isa::Floats middle = Isa::Broadcast(float(L::kMiddle));
  for (int64_t s = s_begin; s < s_end; ++s) {
    const int64_t group = (tile * w.groups + w.segments[s].group) * kTileOutputs;
    for (int at = 0; at < kTileOutputs; at += Isa::kLanes) {
      const Isa::Floats scale = Isa::LoadHalfFloats(w.scales + group + at);
      const Isa::Floats zero =
          w.shared_zero ? shared : Isa::Mul(Isa::LoadByteFloats(w.zeros + group + at), fraction);
      Isa::StoreFloats(stripe.scales[s - s_begin] + at, scale);
      Isa::StoreFloats(stripe.zeros[s - s_begin] + at, Isa::Mul(scale, Isa::Sub(zero, middle)));
    }
  }
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
template <int LimbCount, int Depth, bool Centred, int Rows, class I = Isa>
ONNXQ_NOINLINE void Int8Rows(const Weight& w, const Int8Stripe& stripe, int64_t s_begin, int64_t s_end,
                             const QuantizedRows& rows, int64_t row, float* sums) {
  constexpr int kVectors = Isa::kGemmVectors;
  const int64_t row_bytes = w.blocks * kBlockDepth;
  [[maybe_unused]] const int64_t row_starts = w.blocks * kQuads / Depth;
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
        [[maybe_unused]] const int32_t* start =
            Centred ? rows.starts + row * row_starts + segment.block * kQuads / Depth : nullptr;
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
                if constexpr (Centred && q % Depth == 0)
                  partial[r][i] = I::Pair(start[r * row_starts + q / Depth]);
                partial[r][i] = Isa::Dot(partial[r][i], code[i], quad);
              });
            });
            if constexpr (Depth <= kQuads && (q + 1) % Depth == 0) flush();
          });
          codes += kQuads * kRowBytes;
          x_block += kBlockDepth;
          if constexpr (Centred) start += kQuads / Depth;
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

/// Adds all rows times the stripe into y. Not inlined, for the same reason.
template <int LimbCount, int Depth, bool Centred, bool Wide>
ONNXQ_NOINLINE void MultiplyStripe(const Weight& w, const Int8Stripe& stripe, int64_t tile, int64_t s_begin,
                                   int64_t s_end, const QuantizedRows& rows, const Range& range,
                                   const Output& out) {
  alignas(64) float sums[Isa::kGemmRows * kTileOutputs];
  for (int64_t row = range.row_begin; row < range.row_end;) {
    WithCount<(Wide ? Isa::kWideRows : Isa::kGemmRows)>(
        range.row_end - row, [&](auto count) ONNXQ_INLINE_LAMBDA {
          constexpr int kRows = decltype(count)::value;
          LoadSums(w, tile, row, kRows, s_begin == 0 && !out.resumes, out, sums);
          if constexpr (Wide) {
            WideRows<kRows>(w, stripe, s_begin, s_end, rows, row, sums);
          } else {
            Int8Rows<LimbCount, Depth, Centred, kRows>(w, stripe, s_begin, s_end, rows, row, sums);
          }
          StoreSums(w, tile, row, kRows, s_end == w.segment_count && !out.unfinished, sums, out);
          row += kRows;
        });
  }
}

template <class Format>
void GemmInt8(const Weight& w, const QuantizedRows& rows, const Range& range, const Output& out) {
  using L = Limbs<Format>;
  Int8Stripe stripe;
  for (int64_t s_begin = 0; s_begin < w.segment_count;) {
    int64_t s_end = s_begin;
    int64_t blocks = 0;
    while (s_end < w.segment_count && blocks + w.segments[s_end].blocks <= kChunkBlocks)
      blocks += w.segments[s_end++].blocks;
    for (int64_t tile = range.tile_begin; tile < range.tile_end; ++tile) {
      UnpackStripe<Format>(w, tile, s_begin, s_end, stripe);
      MultiplyStripe<L::kCount, L::kRowsDepth, L::kCentred, kWide<Format>>(w, stripe, tile, s_begin, s_end,
                                                                           rows, range, out);
    }
    s_begin = s_end;
  }
}
