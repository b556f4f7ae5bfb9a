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
