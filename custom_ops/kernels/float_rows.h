// Rows of floats times a stripe: a tile of outputs over kFloatChunkBlocks blocks of K, decoded to floats that
// stay in the nearest caches. Included inside an anonymous namespace, once per ISA, by core.h and
// float8_core.h, which say how many.

constexpr int kPanelOutputs = Isa::kFloatVectors * Isa::kLanes;
constexpr int kPanels = kTileOutputs / kPanelOutputs;

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
ONNXQ_NOINLINE void MultiplyFloatStripe(const Affine& w, const float* stripe, int64_t tile, int64_t b,
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
      StoreSums(w, tile, row, kRows, b_end * kBlockDepth >= w.depth && !out.unfinished, sums, out);
      row += kRows;
    });
  }
}
