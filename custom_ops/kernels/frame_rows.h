// The vector loops of FrameAnalysis and FrameSynthesis: signs, Walsh-Hadamard transform, small product.
// Included by core.h, once per ISA, inside an anonymous namespace.

using onnxq::kernels::FrameProduct;
using onnxq::kernels::SignedCopy;

constexpr int kFrameSums = Isa::kFloatRows * Isa::kFloatVectors;

/// Columns [column, column + lanes) and so on of `Rows` rows; the last vector starts `last` further right.
template <int Rows, int Vectors>
ONNXQ_NOINLINE void FrameBlock(const FrameProduct& p, int64_t row, int64_t column, int64_t last) {
  Isa::Floats acc[Rows][Vectors];
  EachSum<Rows, Vectors>([&](int r, int i) ONNXQ_INLINE_LAMBDA { acc[r][i] = Isa::ZeroFloats(); });
  const float* x = p.x + row * p.x_stride;
  const int64_t x_stride = p.x_stride;
  const float* matrix = p.matrix + column;
  for (int64_t k = 0; k < p.depth; ++k, ++x, matrix += p.matrix_stride) {
    Isa::Floats b[Vectors];
    Unroll<Vectors>([&](auto vector) ONNXQ_INLINE_LAMBDA {
      constexpr int i = decltype(vector)::value;
      b[i] = Isa::LoadFloats(matrix + (i == Vectors - 1 ? last : i * Isa::kLanes));
    });
    Unroll<Rows>([&](auto index) ONNXQ_INLINE_LAMBDA {
      constexpr int r = decltype(index)::value;
      const Isa::Floats a = Isa::Broadcast(x[r * x_stride]);
      Unroll<Vectors>([&](auto vector) ONNXQ_INLINE_LAMBDA {
        constexpr int i = decltype(vector)::value;
        acc[r][i] = Isa::MulAdd(a, b[i], acc[r][i]);
      });
    });
  }
  Unroll<Rows>([&](auto index) ONNXQ_INLINE_LAMBDA {
    constexpr int r = decltype(index)::value;
    float* y = p.y + (row + r) * p.y_stride + column;
    Unroll<Vectors>([&](auto vector) ONNXQ_INLINE_LAMBDA {
      constexpr int i = decltype(vector)::value;
      if (Vectors > 1 || p.outputs >= Isa::kLanes || (row + r) * p.y_stride + Isa::kLanes <= p.y_size) {
        Isa::StoreFloats(y + (i == Vectors - 1 ? last : i * Isa::kLanes), acc[r][i]);
      } else {
        // What a short row writes beyond its end the next row overwrites; the last ones have none.
        alignas(64) float part[Isa::kLanes];
        Isa::StoreFloats(part, acc[r][i]);
        for (int64_t j = 0; j < p.outputs; ++j) y[j] = part[j];
      }
    });
  });
}

template <int Vectors>
ONNXQ_INLINE void FramePanel(const FrameProduct& p, int64_t column, int64_t last) {
  constexpr int kRows = kFrameSums / Vectors < 8 ? kFrameSums / Vectors : 8;
  int64_t row = 0;
  if (p.rows < kRows) {
    for (; row < p.rows; ++row) FrameBlock<1, Vectors>(p, row, column, last);
    return;
  }
  for (; row + kRows <= p.rows; row += kRows) FrameBlock<kRows, Vectors>(p, row, column, last);
  // Some rows are computed twice, to the same values.
  if (row < p.rows) FrameBlock<kRows, Vectors>(p, p.rows - kRows, column, last);
}

/// y [rows, outputs] = x [rows, depth] @ matrix [depth, outputs]; the last two vectors of columns may
/// overlap.
void MultiplyFrame(const FrameProduct& p) {
  constexpr int kMostVectors = 4;
  const int64_t vectors = (p.outputs + Isa::kLanes - 1) / Isa::kLanes;
  const int64_t panels = (vectors + kMostVectors - 1) / kMostVectors;
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t begin = vectors * panel / panels;
    const int64_t end = vectors * (panel + 1) / panels;
    const int64_t column = begin * Isa::kLanes;
    const int64_t ragged = p.outputs - Isa::kLanes - column;
    const int64_t last = vectors == 1 ? 0 : Min((end - 1) * Isa::kLanes - column, ragged);
    WithCount<kMostVectors>(end - begin, [&](auto count) ONNXQ_INLINE_LAMBDA {
      FramePanel<decltype(count)::value>(p, column, last);
    });
  }
}

/// One pass over x [blocks, Radix, run] in place: the Walsh-Hadamard transform of length Radix.
template <int Radix>
ONNXQ_INLINE void HadamardPass(float* x, int64_t size, int64_t run) {
  for (float* block = x; block < x + size; block += Radix * run) {
    for (int64_t at = 0; at < run; at += Isa::kLanes) {
      Isa::Floats v[Radix];
      Unroll<Radix>([&](auto index) ONNXQ_INLINE_LAMBDA {
        constexpr int i = decltype(index)::value;
        v[i] = Isa::LoadFloats(block + i * run + at);
      });
      const auto stage = [&](auto half) ONNXQ_INLINE_LAMBDA {
        constexpr int h = decltype(half)::value;
        Unroll<Radix / 2>([&](auto index) ONNXQ_INLINE_LAMBDA {
          constexpr int i = decltype(index)::value / h * 2 * h + decltype(index)::value % h;
          const Isa::Floats sum = Isa::Add(v[i], v[i + h]);
          v[i + h] = Isa::Sub(v[i], v[i + h]);
          v[i] = sum;
        });
      };
      stage(Constant<1>{});
      if constexpr (Radix >= 4) stage(Constant<2>{});
      if constexpr (Radix >= 8) stage(Constant<4>{});
      Unroll<Radix>([&](auto index) ONNXQ_INLINE_LAMBDA {
        constexpr int i = decltype(index)::value;
        Isa::StoreFloats(block + i * run + at, v[i]);
      });
    }
  }
}

/// x [rows, width] in place, without the factor 1 / sqrt(rows); rows is a power of two, width whole vectors.
void WalshHadamard(float* x, int64_t rows, int64_t width) {
  const int64_t size = rows * width;
  int64_t run = width;
  for (; run * 8 <= size; run *= 8) HadamardPass<8>(x, size, run);
  if (run * 4 == size) HadamardPass<4>(x, size, run);
  if (run * 2 == size) HadamardPass<2>(x, size, run);
}

/// y = x * signs, row by row, between rows that follow each other and rows of whole vectors.
void CopySigned(const SignedCopy& c) {
  // Whole vectors as long as they end inside the rows that follow each other; the next row overwrites what is
  // too much.
  const int64_t width = (c.depth + Isa::kLanes - 1) / Isa::kLanes * Isa::kLanes;
  int64_t row = 0;
  for (; row < c.rows && row * c.depth + width <= c.rows * c.depth; ++row) {
    const float* x = c.x + row * c.x_stride;
    const float* signs = c.signs + row * c.depth;
    float* y = c.y + row * c.y_stride;
    for (int64_t i = 0; i < width; i += Isa::kLanes)
      Isa::StoreFloats(y + i, Isa::Mul(Isa::LoadFloats(x + i), Isa::LoadFloats(signs + i)));
  }
  for (; row < c.rows; ++row) {
    float* y = c.y + row * c.y_stride;
    for (int64_t i = 0; i < c.depth; ++i) y[i] = c.x[row * c.x_stride + i] * c.signs[row * c.depth + i];
    for (int64_t i = c.depth; i < c.y_stride; ++i) y[i] = 0.0f;
  }
}
