// What a kernel is told: raw pointers and plain numbers, checked by whoever fills them in.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/compiler.h"

namespace onnxq::kernels {

constexpr int kTileOutputs = 32;  // outputs that share one run of the packed layout
constexpr int kBlockDepth = 32;   // inputs of one packed block
constexpr int kQuads = 8;         // a block holds 8 quads of 4 consecutive inputs
constexpr int kRowBytes = kTileOutputs * 4;
constexpr int kMaxBits = 8;
constexpr int kMaxCodebookBits = 6;
constexpr int kMaxWindow = 6;
constexpr int kTableLevelBits = 7;  // of an entry of a codebook's table
constexpr int kTableEntries = 1 << kMaxWindow;
/// Windows, besides that of a lone code, that codebook kernels are written for.
constexpr int kCodebookWindows[] = {4, 5, 6};
constexpr int kMaxActivationBlock = 128;  // inputs that share one activation scale, at most

/// Sums of products with levels less kStartMiddle begin anew every kStartQuads quads: see Limbs::kCentred.
constexpr int kStartQuads = 2;
constexpr int kStartMiddle = 1 << (kTableLevelBits - 1);

/// A stretch of K inside which weight scale and activation scale are both constant.
struct Segment {
  int32_t block;       ///< first 32-deep block
  int32_t blocks;      ///< how many blocks: at most kMaxActivationBlock / kBlockDepth
  int32_t group;       ///< scale group of the weight
  int32_t activation;  ///< activation block
};

/// What every product y = gain * (x @ levels.T) + bias is told besides its weight's own tensors.
struct Affine {
  const float* bias;  ///< [outputs], or one value when shared_bias
  bool shared_bias;
  float gain;
  int64_t outputs;  ///< N
  int64_t depth;    ///< K
};

/// One packed weight (layout version 1); pointers are borrowed.
struct Weight : Affine {
  const uint8_t* packed;   ///< [tiles, blocks, bits, 32, 4]
  const uint16_t* scales;  ///< float16 bits, [tiles, groups, 32]
  const uint8_t* zeros;    ///< [tiles, groups, 32], or one value when shared_zero
  bool shared_zero;
  int bits;
  int64_t tiles;             ///< ceil(N / 32)
  int64_t blocks;            ///< ceil(K / 32)
  int64_t groups;            ///< ceil(K / group_size)
  int64_t group_blocks;      ///< group_size / 32
  int64_t activation_depth;  ///< 32-deep blocks that share one activation scale
  const Segment* segments;   ///< covers every block once, in order
  int64_t segment_count;
  const uint8_t* table;  ///< [kTableEntries] levels, repeated to fill it; null: codes are levels
  int window;            ///< bits of an index into table
};

/// One kind of 8-bit floats: a sign, an exponent, a mantissa.
struct Float8Kind {
  const char* name;
  int mantissa_bits;
  int exponent_bias;
  float largest;  ///< finite value
};
constexpr Float8Kind kFloat8Kinds[] = {{"e4m3fn", 3, 7, 448.0f},
                                       {"e5m2", 2, 15, 57344.0f},
                                       {"e4m3fnuz", 3, 8, 240.0f},
                                       {"e5m2fnuz", 2, 16, 57344.0f}};

/// One weight of 8-bit floats; pointers are borrowed.
struct Float8Weight : Affine {
  const uint8_t* codes;    ///< [outputs, depth]
  const uint16_t* scales;  ///< float16 bits, [outputs, groups], or one value when shared_scale
  bool shared_scale;
  int mantissa_bits;
  float unit;           ///< the value of a code over that of the half precision number it is read as
  int64_t group_depth;  ///< inputs that share a scale: depth, or a multiple of 32
  int64_t groups;       ///< 1 when shared_scale
};

/// Activations after int8 quantisation, one row after the other.
struct QuantizedRows {
  int8_t* codes;      ///< [rows, blocks * 32], zero beyond K
  float* scales;      ///< [rows, segments]
  float* scaled_sum;  ///< [rows, segments]: scale * sum of the codes of the segment
  int32_t* starts;    ///< [rows, blocks * kQuads / kStartQuads] pairs of int16, where Products::centred
};

/// The part of the output that one task computes.
struct Range {
  int64_t row_begin, row_end;
  int64_t tile_begin, tile_end;
};

/// Where a product goes, and whether it is one of several that add up in the same place.
struct Output {
  float* y;                 ///< row 0, output 0
  int64_t stride;           ///< floats from one row to the next
  bool resumes = false;     ///< y holds the sums over other inputs, to be added to
  bool unfinished = false;  ///< sums over other inputs will follow: leave out gain and bias
};

/// y [rows, outputs] = x [rows, depth] @ matrix [depth, outputs].
struct FrameProduct {
  const float* x;
  int64_t x_stride;
  const float* matrix;
  int64_t matrix_stride;  ///< whole vectors, at least outputs
  float* y;
  int64_t y_stride;  ///< at least outputs
  int64_t y_size;    ///< floats that may be written from y on
  int64_t rows;
  int64_t depth;
  int64_t outputs;
};

/// y [rows, depth] = x [rows, depth] * signs [rows, depth]. Of the two strides one is depth, the other is
/// depth in whole vectors; columns of y beyond depth hold anything.
struct SignedCopy {
  const float* x;
  int64_t x_stride;
  const float* signs;
  float* y;
  int64_t y_stride;
  int64_t rows;
  int64_t depth;
};

/// The products of one format.
struct Products {
  void (*gemv_int8)(const Weight&, const QuantizedRows&, const Range&, const Output&);
  void (*gemm_int8)(const Weight&, const QuantizedRows&, const Range&, const Output&);
  bool centred;  ///< gemm_int8 reads QuantizedRows::starts
  /// x: one row of blocks * 32 floats, zero beyond K.
  void (*gemv_f32)(const Weight&, const float* x, const Range&, const Output&);
  /// x: [rows, depth].
  void (*gemm_f32)(const Weight&, const float* x, const Range&, const Output&);
};

/// Those of one codebook width: for a window of `bits`, then for each of kCodebookWindows that is not below
/// it.
struct CodebookProducts {
  Products window[4];
};

constexpr int64_t kFloat8Chunk = 384;  // inputs whose sums are taken together: 16 outputs take 24 KiB
constexpr int64_t kFloat8Step = 8;     // inputs of one turn of the innermost loop

/// How Float8Products::many_rows reads x: the rows of one task's range after those of the other. In a range,
/// chunks of inputs follow one another, the last one in whole kFloat8Step with zeros beyond the depth; in a
/// chunk, strips of rows, one register block each, input by input.
struct Float8Strips {
  int64_t rows;    ///< of the range
  int64_t count;   ///< as few as hold the rows
  int64_t each;    ///< rows of a strip
  int64_t longer;  ///< so many, the first ones, have one more

  /// most: KernelTable::gemm_rows_f32.
  ONNXQ_INLINE Float8Strips(int64_t rows, int most)
      : rows(rows), count((rows + most - 1) / most), each(rows / count), longer(rows % count) {}
  /// First row of a strip.
  ONNXQ_INLINE int64_t begin(int64_t strip) const { return strip * each + (strip < longer ? strip : longer); }
  /// Inputs of a row, in whole steps.
  static ONNXQ_INLINE int64_t Depth(int64_t depth) {
    return (depth + kFloat8Step - 1) / kFloat8Step * kFloat8Step;
  }
};

/// The products of 8-bit floats with one width of mantissa.
struct Float8Products {
  /// x: [rows, depth]. The faster one up to kFloat8FewRows.
  void (*few_rows)(const Float8Weight&, const float* x, const Range&, const Output&);
  /// x: see Float8Strips.
  void (*many_rows)(const Float8Weight&, const float* x, const Range&, const Output&);
  /// Row `row` of the weight, depth floats.
  void (*decode_row)(const Float8Weight&, int64_t row, float* out);
};
constexpr int kFloat8FewRows = 8;

/// One ISA's kernels of 8-bit floats.
struct Float8Kernels {
  Float8Products e4m3;
  Float8Products e5m2;
  /// y = scale * (x / scale rounded to a value of the kind).
  void (*round)(const Float8Kind&, float scale, const float* x, int64_t count, float* y);
  /// The largest magnitude; not a number where one of x is.
  float (*largest_magnitude)(const float* x, int64_t count);
};

/// One ISA's kernels; those in arrays are indexed by bits (entry 0 is unused).
struct KernelTable {
  const char* isa;
  int gemm_rows_int8;  ///< rows of one register block: tasks take whole multiples
  int gemm_rows_f32;
  void (*quantize_row)(const Weight&, const float* x, int8_t* codes, float* scales, float* scaled_sum);
  void (*sum_starts)(const Weight&, const int8_t* codes, int32_t* starts);
  /// Blocks of 32 inputs, picked from a row x and written one after the other: input j times
  /// 2**(-columns[j] / 8) * step.
  void (*scale_columns)(const float* x, const uint8_t* columns, float step, const int32_t* blocks,
                        int64_t count, float* out);
  Products uniform[kMaxBits + 1];
  CodebookProducts codebook[kMaxCodebookBits + 1];
  int lanes;  ///< floats of one vector
  void (*copy_signed)(const SignedCopy&);
  /// x [rows, width] in place over the rows, not normalised; rows a power of two, width whole vectors.
  void (*walsh_hadamard)(float* x, int64_t rows, int64_t width);
  void (*multiply_frame)(const FrameProduct&);
  const Float8Kernels* float8;  ///< a translation unit of their own
};

}  // namespace onnxq::kernels
