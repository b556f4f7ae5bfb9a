// Look-ups of keys in tables of bytes. Included inside an anonymous namespace after a trait `Isa` with
// vectors of 32 or 64 bytes, unroll.h and a struct `ByteTable`.

using onnxq::kernels::kBinaryHalf;
using onnxq::kernels::kBinaryTile;
using onnxq::kernels::kBlockDepth;
using onnxq::kernels::kByteZero;
using onnxq::kernels::kChunkDepth;
using onnxq::kernels::kKeys;

using Words = uint16_t __attribute__((vector_size(sizeof(Isa::Bytes))));
using Numbers = int32_t __attribute__((vector_size(sizeof(Isa::Bytes))));

constexpr int kTileFloats = kBinaryTile / Isa::kLanes;  // vectors of a tile's sums
constexpr int kVectorChunks = sizeof(Isa::Bytes) / kBinaryHalf;
/// Copies of a table in memory: a vector of one chunk broadcasts the only one, one of two chunks is filled by
/// two each.
constexpr int kTableCopies = kVectorChunks == 1 ? 1 : 2;

constexpr int kBlockChunks = kBlockDepth / kChunkDepth;
constexpr int kLine = 64;  // bytes of a line of the cache
/// What is asked for early: the processor itself does not look ahead beyond a page, which may be a whole
/// tile, after which another plane's codes come.
constexpr int kAhead = 4096;

/// The first halves of two vectors, or their second ones. `V` is Isa::Floats, of sixteen lanes where this is
/// used.
template <int Half, class V>
ONNXQ_INLINE V Halves(V a, V b) {
  if constexpr (Half == 0)
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
  return __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}

/// Sums of the entries of a tile's rows, in 16 bits.
template <int Rows>
struct WordSums {
  Words all[Rows][2];  // of low and high keys: bytes 2 i, and 256 times bytes 2 i + 1
  Words odd[Rows][2];  // bytes 2 i + 1
};

/// sums [Rows][64] += tables' entries of a tile's rows, over `chunks` chunks, times their scales.
///
/// Entries are bytes of neighbouring rows, and a sum of them needs 16 bits. Adding words adds even bytes, and
/// odd ones times 256; the odd ones are added once more alone, to be taken off later.
template <int Rows>
ONNXQ_INLINE void LookBytes(const uint8_t* codes, const uint8_t* tables, int64_t table_stride, int64_t chunks,
                            const float* scales, int64_t scale_stride,
                            Isa::Floats (&sums)[Rows][kTileFloats]) {
  WordSums<Rows> words;
  EachSum<Rows, 2>([&](int r, int half)
                       ONNXQ_INLINE_LAMBDA { words.all[r][half] = words.odd[r][half] = Words{}; });
  for (int64_t c = 0; c < chunks; c += kBlockChunks, codes += kBlockChunks * kBinaryHalf) {
    for (int at = 0; at < kBlockChunks * kBinaryHalf; at += kLine) __builtin_prefetch(codes + kAhead + at);
    Unroll<kBlockChunks / kVectorChunks>([&](auto step) ONNXQ_INLINE_LAMBDA {
      constexpr int at = decltype(step)::value * kVectorChunks;
      const Isa::Bytes keys = Isa::Load(codes + at * kBinaryHalf);
      const Isa::Bytes low = Isa::template And<0x0f0f0f0fu>(keys);
      const Isa::Bytes high = Isa::template And<0x0f0f0f0fu>(Isa::template Shift<4>(keys));
      Unroll<Rows>([&](auto row) ONNXQ_INLINE_LAMBDA {
        constexpr int r = decltype(row)::value;
        const ByteTable table(tables + r * table_stride + (c + at) * kKeys * kTableCopies);
        const Words entries[2] = {Words(table.Look(low)), Words(table.Look(high))};
        Unroll<2>([&](auto half) ONNXQ_INLINE_LAMBDA {
          constexpr int h = decltype(half)::value;
          words.all[r][h] += entries[h];
          words.odd[r][h] += Words(ByteTable::Odd(Isa::Bytes(entries[h])));
        });
      });
    });
  }
  const Words excess = Words{} + uint16_t(kByteZero * chunks / kVectorChunks);
  Unroll<Rows>([&](auto row) ONNXQ_INLINE_LAMBDA {
    constexpr int r = decltype(row)::value;
    const Isa::Floats scale = Isa::Broadcast(scales[r * scale_stride]);
    Words parity[2][2];  // rows of low and high keys, even and odd ones
    Unroll<2>([&](auto half) ONNXQ_INLINE_LAMBDA {
      constexpr int h = decltype(half)::value;
      parity[h][0] = words.all[r][h] - (words.odd[r][h] << 8) - excess;
      parity[h][1] = words.odd[r][h] - excess;
    });
    Unroll<2>([&](auto index) ONNXQ_INLINE_LAMBDA {
      constexpr int p = decltype(index)::value;
      // A vector of 64 bytes holds two chunks: their sums become those of low and high keys.
      if constexpr (kVectorChunks == 2) {
        const Isa::Floats low = Isa::Floats(parity[0][p]), high = Isa::Floats(parity[1][p]);
        parity[0][p] = Words(Halves<0>(low, high)) + Words(Halves<1>(low, high));
      }
      Unroll<2 / kVectorChunks>([&](auto half) ONNXQ_INLINE_LAMBDA {
        constexpr int h = decltype(half)::value;
        const Numbers pairs = Numbers(parity[h][p]);
        Isa::Floats* to = sums[r] + 4 * h + p;
        to[0] = Isa::MulAdd(Isa::ToFloats(Isa::Ints(pairs << 16 >> 16)), scale, to[0]);
        to[2] = Isa::MulAdd(Isa::ToFloats(Isa::Ints(pairs >> 16)), scale, to[2]);
      });
    });
  });
}

/// a[0], b[0], a[1], b[1] ... from the first half of their lanes, or from the second.
template <int Half, class V>
ONNXQ_INLINE V Zip(V a, V b) {
  if constexpr (Isa::kLanes == 8) {
    if constexpr (Half == 0) return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
    return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  } else {
    if constexpr (Half == 0)
      return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  }
}

/// From the order in which LookBytes leaves sums, row 4 j + i of a part in lane j of its vector i, to rows.
ONNXQ_INLINE void OrderRows(Isa::Floats (&sums)[kTileFloats]) {
  for (int i = 0; i < kTileFloats; i += 4) {
    const Isa::Floats a = Zip<0>(sums[i], sums[i + 2]), b = Zip<0>(sums[i + 1], sums[i + 3]);
    const Isa::Floats c = Zip<1>(sums[i], sums[i + 2]), d = Zip<1>(sums[i + 1], sums[i + 3]);
    sums[i] = Zip<0>(a, b);
    sums[i + 1] = Zip<1>(a, b);
    sums[i + 2] = Zip<0>(c, d);
    sums[i + 3] = Zip<1>(c, d);
  }
}
