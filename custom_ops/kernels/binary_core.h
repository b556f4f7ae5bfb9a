// Products of binary codes over a vector trait `Isa`, apart from core.h because that takes minutes to
// compile. Included inside an anonymous namespace after the trait, unroll.h, a struct `FloatTable`, costs,
// and what binary_words.h holds; like core.h it uses no standard-library function.
//
// Few rows of x are not multiplied at all: every chunk of four inputs has sixteen sums +-x0 +-x1 +-x2 +-x3,
// and a weight's four signs say which of them is meant. Sums are shared by all outputs and planes. Many rows
// meet a stripe: codes decoded once to floats.

using onnxq::kernels::Affine;
using onnxq::kernels::BinaryKernels;
using onnxq::kernels::BinaryPlane;
using onnxq::kernels::BinaryTables;
using onnxq::kernels::BinaryWeight;
using onnxq::kernels::kTableDepth;
using onnxq::kernels::kTileOutputs;
using onnxq::kernels::Output;
using onnxq::kernels::Range;

#include "kernels/sums.h"

constexpr int kFloatChunkBlocks = 16;  // as float8_core.h

#include "kernels/float_rows.h"

constexpr int kTableVectors = kKeys / Isa::kLanes;

static_assert(kBinaryHalf == kTileOutputs && kBinaryTile == 2 * kTileOutputs);

// ---- tables of a row --------------------------------------------------------------------------------------

/// Of key bits 0 to 3: -1 or 1.
alignas(64) constexpr float kSigns[kChunkDepth][kKeys] = {
    {-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1},
    {-1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1},
    {-1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1},
    {-1, -1, -1, -1, -1, -1, -1, -1, 1, 1, 1, 1, 1, 1, 1, 1}};

/// table [16]: the sums of four inputs.
ONNXQ_INLINE void ChunkTable(const float* x, float* table) {
  for (int i = 0; i < kTableVectors; ++i) {
    const auto signs = [&](int j)
                           ONNXQ_INLINE_LAMBDA { return Isa::LoadFloats(kSigns[j] + i * Isa::kLanes); };
    Isa::Floats sum = Isa::Mul(Isa::Broadcast(x[0]), signs(0));
    for (int j = 1; j < kChunkDepth; ++j) sum = Isa::MulAdd(Isa::Broadcast(x[j]), signs(j), sum);
    Isa::StoreFloats(table + i * Isa::kLanes, sum);
  }
}

/// Inputs [k, k + count) of a row, from a zero-padded copy where the row ends before.
ONNXQ_INLINE const float* PaddedInputs(const float* x, int64_t k, int64_t count, int64_t depth, float* copy) {
  if (k + count <= depth) return x + k;
  for (int64_t i = 0; i < count; ++i) copy[i] = k + i < depth ? x[k + i] : 0.0f;
  return copy;
}

/// The end of group `group`, in inputs of whole blocks.
ONNXQ_INLINE int64_t GroupEnd(const BinaryWeight& w, int64_t group) {
  return Min((group + 1) * w.group_depth, w.chunks * kChunkDepth);
}

/// The largest sum of magnitudes of a chunk. As whole numbers, among which infinities and NaNs are the
/// largest: no maximum of floats would show a NaN.
ONNXQ_INLINE float LargestChunk(const float* x, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; i += kChunkDepth) {
    float sum = 0.0f;
    for (int j = 0; j < kChunkDepth; ++j) sum += __builtin_fabsf(x[i + j]);
    uint32_t bits;
    __builtin_memcpy(&bits, &sum, sizeof bits);
    bits &= 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  float sum;
  __builtin_memcpy(&sum, &largest, sizeof sum);
  return sum;
}

void MakeBytes(const BinaryWeight& w, const float* x, const BinaryTables& row) {
  // Below this the reciprocal overflows; such inputs are worth nothing beside a float32 sum.
  constexpr float kTiny = 1e-30f;
  alignas(64) float copy[kTableDepth];
  alignas(64) float tables[2 * kKeys];
  uint8_t* to = row.bytes;
  for (int64_t group = 0; group < w.groups; ++group) {
    const int64_t end = GroupEnd(w, group);
    float* scales = row.scales + group * w.group_tables;
    float sum = 0.0f;
    for (int64_t k = group * w.group_depth; k < end; k += kTableDepth) {
      const int64_t count = Min<int64_t>(kTableDepth, end - k);
      const float* inputs = PaddedInputs(x, k, count, w.depth, copy);
      const float largest = LargestChunk(inputs, count);
      *scales++ = largest / 127.0f + largest * 0.0f;  // NaN where there is an infinity
      const float inverse = largest > kTiny ? 127.0f / largest : 0.0f;
      for (int64_t i = 0; i < count; ++i) sum += inputs[i];
      for (int64_t i = 0; i < count; i += 2 * kChunkDepth) {
        ChunkTable(inputs + i, tables);
        ChunkTable(inputs + i + kChunkDepth, tables + kKeys);
        alignas(64) int8_t codes[2 * kKeys];
        Isa::Ints unused = Isa::ZeroInts();
        Isa::Quantize32(tables, inverse, codes, unused);
        for (int j = 0; j < 2 * kKeys; ++j) codes[j] = int8_t(codes[j] ^ kByteZero);
        for (int chunk = 0; chunk < 2; ++chunk)
          for (int c = 0; c < kTableCopies; ++c, to += kKeys)
            __builtin_memcpy(to, codes + chunk * kKeys, kKeys);
      }
    }
    row.sums[group] = sum;
  }
}

void MakeFloats(const BinaryWeight& w, const float* x, const BinaryTables& row) {
  alignas(64) float copy[kBlockDepth];
  float* to = row.floats;
  for (int64_t group = 0; group < w.groups; ++group) {
    const int64_t end = GroupEnd(w, group);
    float sum = 0.0f;
    for (int64_t k = group * w.group_depth; k < end; k += kBlockDepth) {
      const float* inputs = PaddedInputs(x, k, kBlockDepth, w.depth, copy);
      for (int i = 0; i < kBlockDepth; ++i) sum += inputs[i];
      for (int i = 0; i < kBlockDepth; i += kChunkDepth, to += kKeys) ChunkTable(inputs + i, to);
    }
    row.sums[group] = sum;
  }
}

// ---- scales -----------------------------------------------------------------------------------------------

/// The scales of one plane, tile and group: float16 [64], zero for rows that do not have the plane.
ONNXQ_INLINE const uint16_t* TileScales(const BinaryWeight& w, const BinaryPlane& plane, int64_t tile,
                                        int64_t group, uint16_t* copy) {
  const uint16_t* scales = plane.scales + (tile * w.groups + group) * kBinaryTile;
  const int64_t rows = plane.rows - tile * kBinaryTile;
  if (rows >= kBinaryTile) return scales;
  for (int64_t i = 0; i < kBinaryTile; ++i) copy[i] = i < rows ? scales[i] : uint16_t{0};
  return copy;
}

/// Planes that any row of a tile has: those come first.
ONNXQ_INLINE int TilePlanes(const BinaryWeight& w, int64_t tile) {
  int planes = w.plane_count;
  while (w.planes[planes - 1].rows <= tile * kBinaryTile) --planes;
  return planes;
}

ONNXQ_INLINE const uint8_t* TileCodes(const BinaryWeight& w, const BinaryPlane& plane, int64_t tile) {
  return plane.codes + tile * w.chunks * kBinaryHalf;
}

/// total [64] += the offsets of a tile times the sums of x.
ONNXQ_INLINE void AddOffsets(const BinaryWeight& w, int64_t tile, const float* sums, float* total) {
  if (!w.offsets) return;
  const uint16_t* offsets = w.offsets + tile * w.groups * kBinaryTile;
  for (int64_t group = 0; group < w.groups; ++group, offsets += kBinaryTile)
    for (int i = 0; i < kBinaryTile; i += Isa::kLanes)
      Isa::StoreFloats(total + i, Isa::MulAdd(Isa::LoadHalfFloats(offsets + i), Isa::Broadcast(sums[group]),
                                              Isa::LoadFloats(total + i)));
}

/// total [64] += scales * sums [64].
ONNXQ_INLINE void AddScaled(const uint16_t* scales, const Isa::Floats (&sums)[kTileFloats], float* total) {
  for (int i = 0; i < kTileFloats; ++i) {
    float* at = total + i * Isa::kLanes;
    Isa::StoreFloats(
        at, Isa::MulAdd(sums[i], Isa::LoadHalfFloats(scales + i * Isa::kLanes), Isa::LoadFloats(at)));
  }
}

/// total: [64].
ONNXQ_INLINE void StoreTile(const BinaryWeight& w, int64_t tile, int64_t row, const float* total,
                            const Output& out) {
  for (int half = 0; half < 2; ++half)
    if (tile * kBinaryTile + half * kBinaryHalf < w.outputs)
      StoreSums(w, 2 * tile + half, row, 1, true, total + half * kBinaryHalf, out);
}

// ---- few rows ---------------------------------------------------------------------------------------------

template <int Rows>
ONNXQ_NOINLINE void LookTile(const BinaryWeight& w, const BinaryTables& tables, int64_t tile, int64_t row,
                             const Output& out) {
  const int64_t table_stride = w.chunks * kKeys * kTableCopies;
  const int64_t scale_stride = w.groups * w.group_tables;
  alignas(64) float total[Rows][kBinaryTile] = {};
  for (int p = 0; p < TilePlanes(w, tile); ++p) {
    const BinaryPlane& plane = w.planes[p];
    const uint8_t* codes = TileCodes(w, plane, tile);
    const uint8_t* bytes = tables.bytes + row * table_stride;
    for (int64_t group = 0; group < w.groups; ++group) {
      Isa::Floats sums[Rows][kTileFloats];
      EachSum<Rows, kTileFloats>([&](int r, int i) ONNXQ_INLINE_LAMBDA { sums[r][i] = Isa::ZeroFloats(); });
      const float* scales = tables.scales + row * scale_stride + group * w.group_tables;
      const int64_t end = GroupEnd(w, group);
      for (int64_t k = group * w.group_depth; k < end; k += kTableDepth, ++scales) {
        const int64_t chunks = Min<int64_t>(kTableDepth, end - k) / kChunkDepth;
        LookBytes<Rows>(codes, bytes, table_stride, chunks, scales, scale_stride, sums);
        codes += chunks * kBinaryHalf;
        bytes += chunks * kKeys * kTableCopies;
      }
      uint16_t copy[kBinaryTile];
      const uint16_t* factors = TileScales(w, plane, tile, group, copy);
      for (int r = 0; r < Rows; ++r) {
        OrderRows(sums[r]);
        AddScaled(factors, sums[r], total[r]);
      }
    }
  }
  for (int r = 0; r < Rows; ++r) {
    AddOffsets(w, tile, tables.sums + (row + r) * w.groups, total[r]);
    StoreTile(w, tile, row + r, total[r], out);
  }
}

void LookBytesRange(const BinaryWeight& w, const BinaryTables& tables, const Range& range,
                    const Output& out) {
  // Rows whose tables stay in the nearest caches while tiles pass by.
  constexpr int64_t kTableBytes = 32 << 10;
  const int64_t most = kTableBytes / (w.chunks * kKeys * kTableCopies);
  const int64_t step = most < kLookRows ? kLookRows : most / kLookRows * kLookRows;
  for (int64_t begin = range.row_begin; begin < range.row_end; begin += step)
    for (int64_t tile = range.tile_begin; tile < range.tile_end; ++tile)
      for (int64_t row = begin; row < Min(begin + step, range.row_end);) {
        WithCount<kLookRows>(Min(begin + step, range.row_end) - row, [&](auto rows) ONNXQ_INLINE_LAMBDA {
          constexpr int kRows = decltype(rows)::value;
          LookTile<kRows>(w, tables, tile, row, out);
          row += kRows;
        });
      }
}

ONNXQ_NOINLINE void LookFloatsTile(const BinaryWeight& w, const BinaryTables& tables, int64_t tile,
                                   int64_t row, const Output& out) {
  constexpr int kHalfVectors = kBinaryHalf / Isa::kLanes;
  alignas(64) float total[kBinaryTile] = {};
  for (int p = 0; p < TilePlanes(w, tile); ++p) {
    const BinaryPlane& plane = w.planes[p];
    const uint8_t* codes = TileCodes(w, plane, tile);
    const float* floats = tables.floats + row * w.chunks * kKeys;
    for (int64_t group = 0; group < w.groups; ++group) {
      Isa::Floats sums[kTileFloats];
      for (int i = 0; i < kTileFloats; ++i) sums[i] = Isa::ZeroFloats();
      const int64_t chunks = (GroupEnd(w, group) - group * w.group_depth) / kChunkDepth;
      for (int64_t c = 0; c < chunks; ++c, codes += kBinaryHalf, floats += kKeys) {
        const FloatTable table(floats);
        Unroll<kHalfVectors>([&](auto vector) ONNXQ_INLINE_LAMBDA {
          constexpr int i = decltype(vector)::value;
          Isa::Floats low, high;
          table.Look(codes + i * Isa::kLanes, low, high);
          sums[i] = Isa::Add(sums[i], low);
          sums[kHalfVectors + i] = Isa::Add(sums[kHalfVectors + i], high);
        });
      }
      uint16_t copy[kBinaryTile];
      AddScaled(TileScales(w, plane, tile, group, copy), sums, total);
    }
  }
  AddOffsets(w, tile, tables.sums + row * w.groups, total);
  StoreTile(w, tile, row, total, out);
}

void LookFloatsRange(const BinaryWeight& w, const BinaryTables& tables, const Range& range,
                     const Output& out) {
  for (int64_t tile = range.tile_begin; tile < range.tile_end; ++tile)
    for (int64_t row = range.row_begin; row < range.row_end; ++row) LookFloatsTile(w, tables, tile, row, out);
}

// ---- many rows --------------------------------------------------------------------------------------------

using Bits = uint32_t __attribute__((vector_size(sizeof(Isa::Floats))));

/// stripe [kPanels][kFloatChunkBlocks * 32][kPanelOutputs]: inputs [begin, end) of one half of a tile, in
/// whole blocks.
ONNXQ_NOINLINE void DecodeStripe(const BinaryWeight& w, int64_t tile, int half, int64_t begin, int64_t end,
                                 float* stripe) {
  const int planes = TilePlanes(w, tile);
  for (int i = 0; i < kTileVectors; ++i) {
    const int at = half * kBinaryHalf + i * Isa::kLanes;
    float* to = stripe + (i / Isa::kFloatVectors) * kFloatChunkBlocks * kBlockDepth * kPanelOutputs +
                (i % Isa::kFloatVectors) * Isa::kLanes;
    for (int64_t k = begin; k < end;) {
      const int64_t group = k / w.group_depth;
      const int64_t group_end = Min(GroupEnd(w, group), end);
      Isa::Floats minus[onnxq::kernels::kMaxPlanes];
      for (int p = 0; p < planes; ++p) {
        uint16_t copy[kBinaryTile];
        const uint16_t* scales = TileScales(w, w.planes[p], tile, group, copy);
        minus[p] = Isa::Sub(Isa::ZeroFloats(), Isa::LoadHalfFloats(scales + at));
      }
      Isa::Floats offset = Isa::ZeroFloats();
      if (w.offsets) offset = Isa::LoadHalfFloats(w.offsets + (tile * w.groups + group) * kBinaryTile + at);
      for (; k < group_end; k += kChunkDepth, to += kChunkDepth * kPanelOutputs) {
        Isa::Floats value[kChunkDepth] = {offset, offset, offset, offset};
        for (int p = 0; p < planes; ++p) {
          // The key's highest bit becomes the sign, then each below it.
          const uint8_t* keys = TileCodes(w, w.planes[p], tile) + k / kChunkDepth * kBinaryHalf;
          const Bits bytes = FloatTable::LoadBytes(keys + i * Isa::kLanes) << (half == 0 ? 28 : 24);
          Unroll<kChunkDepth>([&](auto input) ONNXQ_INLINE_LAMBDA {
            constexpr int j = decltype(input)::value;
            const Bits sign = bytes << (kChunkDepth - 1 - j) & 0x80000000u;
            value[j] = Isa::Add(value[j], Isa::Floats(Bits(minus[p]) ^ sign));
          });
        }
        Unroll<kChunkDepth>([&](auto input) ONNXQ_INLINE_LAMBDA {
          constexpr int j = decltype(input)::value;
          Isa::StoreFloats(to + j * kPanelOutputs, value[j]);
        });
      }
    }
  }
}

void ManyRows(const BinaryWeight& w, const float* x, const Range& range, const Output& out) {
  alignas(64) float stripe[kFloatChunkBlocks * kBlockDepth * kTileOutputs];
  const int64_t blocks = w.chunks * kChunkDepth / kBlockDepth;
  for (int64_t b = 0; b < blocks; b += kFloatChunkBlocks) {
    const int64_t b_end = Min(b + kFloatChunkBlocks, blocks);
    for (int64_t half = 2 * range.tile_begin; half < 2 * range.tile_end; ++half) {
      if (half * kBinaryHalf >= w.outputs) break;
      DecodeStripe(w, half / 2, int(half % 2), b * kBlockDepth, b_end * kBlockDepth, stripe);
      MultiplyFloatStripe(w, stripe, half, b, b_end, x, range, out);
    }
  }
}

constexpr BinaryKernels MakeBinaryKernels(const onnxq::kernels::KernelTable& common) {
  return {&common,    kTableCopies,   kBytesCost,      kFloatsCost, MakeBytes,
          MakeFloats, LookBytesRange, LookFloatsRange, ManyRows};
}
