// Products with float32 activations. Included by core.h, once per ISA, inside an anonymous namespace.

template <class Format>
void GemvF32(const Weight& w, const float* x, const Range& range, const Output& out) {
  constexpr int64_t kBlockBytes = int64_t(Format::kBits) * kRowBytes;
  const Isa::Floats fraction = Isa::Broadcast(kZeroUnit<Format>);
  const Isa::Floats shared = Isa::Broadcast(SharedZero<Format>(w));
  for (int64_t tile = range.tile_begin; tile < range.tile_end; ++tile) {
    alignas(64) float result[kTileOutputs];
    LoadSums(w, tile, range.row_begin, 1, !out.resumes, out, result);
    const Format levels(w, tile);
    Isa::Floats acc[kTileVectors];
    for (int i = 0; i < kTileVectors; ++i) acc[i] = Isa::LoadFloats(result + i * Isa::kLanes);
    for (int64_t b = 0; b < w.blocks;) {
      const int64_t group = b / w.group_blocks;
      const int64_t end = Min((group + 1) * w.group_blocks, w.blocks);
      // Sums of code * x and of x; the zero point is taken off once a group.
      Isa::Floats dot[kTileVectors];
      Isa::Floats sum = Isa::ZeroFloats();
      for (int i = 0; i < kTileVectors; ++i) dot[i] = Isa::ZeroFloats();
      for (; b < end; ++b) {
        const float* x_block = x + b * kBlockDepth;
        levels.template EachFloat<kTileVectors>(
            b * kBlockBytes, [&](auto quad, auto vector, auto j, Isa::Floats codes) ONNXQ_INLINE_LAMBDA {
              constexpr int i = decltype(vector)::value;
              const Isa::Floats input = Isa::Broadcast(x_block[4 * quad.value + j.value]);
              if constexpr (i == 0) sum = Isa::Add(sum, input);
              dot[i] = Isa::MulAdd(codes, input, dot[i]);
            });
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
    StoreSums(w, tile, range.row_begin, 1, !out.unfinished, result, out);
  }
}

constexpr int kFloatChunkBlocks = 8;  // 256 inputs: a panel of 16 outputs takes 16 KiB
constexpr int kPanelOutputs = Isa::kFloatVectors * Isa::kLanes;
constexpr int kPanels = kTileOutputs / kPanelOutputs;

template <class Format>
ONNXQ_NOINLINE void DequantizeStripe(const Weight& w, int64_t tile, int64_t b_begin, int64_t b_end,
                                     float* stripe) {
  const Format levels(w, tile);
  const Isa::Floats fraction = Isa::Broadcast(kZeroUnit<Format>);
  const Isa::Floats shared = Isa::Broadcast(SharedZero<Format>(w));
  for (int64_t b = b_begin; b < b_end; ++b) {
    const int64_t side = (tile * w.groups + b / w.group_blocks) * kTileOutputs;
    for (int i = 0; i < kTileVectors; ++i) {
      const int64_t at = side + i * Isa::kLanes;
      const Isa::Floats scale = Isa::LoadHalfFloats(w.scales + at);
      const Isa::Floats zero = w.shared_zero ? shared : Isa::Mul(Isa::LoadByteFloats(w.zeros + at), fraction);
      const int panel = i / Isa::kFloatVectors;
      float* to = stripe + panel * kFloatChunkBlocks * kBlockDepth * kPanelOutputs +
                  (b - b_begin) * kBlockDepth * kPanelOutputs + (i % Isa::kFloatVectors) * Isa::kLanes;
      levels.template EachFloat<1>(b * Format::kBits * kRowBytes + i * kVectorBytes,
                                   [&](auto quad, auto, auto j, Isa::Floats codes) ONNXQ_INLINE_LAMBDA {
                                     Isa::StoreFloats(to + (4 * quad.value + j.value) * kPanelOutputs,
                                                      Isa::Mul(Isa::Sub(codes, zero), scale));
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

/// Adds all rows times the stripe of blocks [b, b_end) into y. Not inlined: every format shares the one copy.
ONNXQ_NOINLINE void MultiplyFloatStripe(const Weight& w, const float* stripe, int64_t tile, int64_t b,
                                        int64_t b_end, const float* x, const Range& range,
                                        const Output& out) {
  alignas(64) float sums[Isa::kFloatRows * kTileOutputs];
  const int64_t k = b * kBlockDepth;
  const int64_t depth = Min(b_end * kBlockDepth, w.depth) - k;
  for (int64_t row = range.row_begin; row < range.row_end;) {
    WithCount<Isa::kFloatRows>(range.row_end - row, [&](auto count) ONNXQ_INLINE_LAMBDA {
      constexpr int kRows = decltype(count)::value;
      LoadSums(w, tile, row, kRows, b == 0 && !out.resumes, out, sums);
      for (int panel = 0; panel < kPanels; ++panel)
        FloatRows<kRows>(x + row * w.depth + k, w.depth,
                         stripe + panel * kFloatChunkBlocks * kBlockDepth * kPanelOutputs, depth,
                         sums + panel * kPanelOutputs);
      StoreSums(w, tile, row, kRows, b_end == w.blocks && !out.unfinished, sums, out);
      row += kRows;
    });
  }
}

template <class Format>
void GemmF32(const Weight& w, const float* x, const Range& range, const Output& out) {
  alignas(64) float stripe[kFloatChunkBlocks * kBlockDepth * kTileOutputs];
  for (int64_t b = 0; b < w.blocks; b += kFloatChunkBlocks) {
    const int64_t b_end = Min(b + kFloatChunkBlocks, w.blocks);
    for (int64_t tile = range.tile_begin; tile < range.tile_end; ++tile) {
      DequantizeStripe<Format>(w, tile, b, b_end, stripe);
      MultiplyFloatStripe(w, stripe, tile, b, b_end, x, range, out);
    }
  }
}
