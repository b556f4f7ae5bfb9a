// What a kernel is told: raw pointers and plain numbers, checked by whoever fills them in.
#pragma once

#include <cstddef>
#include <cstdint>

namespace onnxq::kernels {

constexpr int kTileOutputs = 32;  // outputs that share one run of the packed layout
constexpr int kBlockDepth = 32;   // inputs of one packed block
constexpr int kQuads = 8;         // a block holds 8 quads of 4 consecutive inputs
constexpr int kRowBytes = kTileOutputs * 4;
constexpr int kMaxBits = 8;
constexpr int kMaxActivationBlock = 128;  // inputs that share one activation scale, at most

/// A stretch of K inside which weight scale and activation scale are both constant.
struct Segment {
  int32_t block;       ///< first 32-deep block
  int32_t blocks;      ///< how many blocks: at most kMaxActivationBlock / kBlockDepth
  int32_t group;       ///< scale group of the weight
  int32_t activation;  ///< activation block
};

/// One packed weight (layout version 1); pointers are borrowed.
struct Weight {
  const uint8_t* packed;   ///< [tiles, blocks, bits, 32, 4]
  const uint16_t* scales;  ///< float16 bits, [tiles, groups, 32]
  const uint8_t* zeros;    ///< [tiles, groups, 32], or one value when shared_zero
  const float* bias;       ///< [outputs], or one value when shared_bias
  bool shared_zero;
  bool shared_bias;
  int bits;
  float gain;
  int64_t outputs;           ///< N
  int64_t depth;             ///< K
  int64_t tiles;             ///< ceil(N / 32)
  int64_t blocks;            ///< ceil(K / 32)
  int64_t groups;            ///< ceil(K / group_size)
  int64_t group_blocks;      ///< group_size / 32
  int64_t activation_depth;  ///< 32-deep blocks that share one activation scale
  const Segment* segments;   ///< covers every block once, in order
  int64_t segment_count;
};

/// Activations after int8 quantisation, one row after the other.
struct QuantizedRows {
  int8_t* codes;      ///< [rows, blocks * 32], zero beyond K
  float* scales;      ///< [rows, segments]
  float* scaled_sum;  ///< [rows, segments]: scale * sum of the codes of the segment
};

/// The part of the output that one task computes.
struct Range {
  int64_t row_begin, row_end;
  int64_t tile_begin, tile_end;
};

/// One ISA's kernels; those in arrays are indexed by bits (entry 0 is unused).
struct KernelTable {
  const char* isa;
  int gemm_rows_int8;  ///< rows of one register block: tasks take whole multiples
  int gemm_rows_f32;
  void (*quantize_row)(const Weight&, const float* x, int8_t* codes, float* scales, float* scaled_sum);
  void (*gemv_int8[kMaxBits + 1])(const Weight&, const QuantizedRows&, const Range&, float* y);
  void (*gemm_int8[kMaxBits + 1])(const Weight&, const QuantizedRows&, const Range&, float* y);
  /// x: one row of blocks * 32 floats, zero beyond K.
  void (*gemv_f32[kMaxBits + 1])(const Weight&, const float* x, const Range&, float* y);
  /// x: [rows, depth].
  void (*gemm_f32[kMaxBits + 1])(const Weight&, const float* x, const Range&, float* y);
};

}  // namespace onnxq::kernels
