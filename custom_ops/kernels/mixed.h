// y = x @ W.T + bias for a weight of mixed bit depths.
//
// Outputs are cut into bands, inputs into blocks of 32 in an order of their own, and each band has a depth
// for each block. The blocks of one band and depth are a *run*: their bytes lie together and are an ordinary
// packed weight with one scale group, so a band's product is the sum of one ordinary product for each of its
// depths, over inputs that were put in order and multiplied by the band's column scales before.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/matmul.h"
#include "kernels/problem.h"

namespace onnxq::kernels {

constexpr int kMaxDepth = 8;     ///< bits of the deepest block
constexpr int kTableDepths = 6;  ///< depths 1 to 6 look their levels up
constexpr int kMixedWindow = 4;  ///< index bits of shallower depths; deeper ones have their own code alone

struct MixedRun {
  Weight weight;        ///< but for pointers into the weight's tensors
  int64_t offset;       ///< of its bytes in `packed`
  int64_t first_block;  ///< in MixedLayout::run_blocks
  int64_t first_segment;
};

/// What follows from shape and depths alone.
class MixedLayout {
 public:
  /// depths: [bands, blocks] with values of at most kMaxDepth; band: a multiple of 32 outputs.
  MixedLayout(int64_t outputs, int64_t depth, int64_t band, const uint8_t* depths);
  MixedLayout(MixedLayout&&) = default;

  int64_t outputs;
  int64_t depth;
  int64_t tiles;
  int64_t blocks;
  int64_t band_tiles;
  int64_t bands;
  int64_t packed_bytes = 0;
  std::vector<MixedRun> runs;       ///< band by band, each with ascending depths; none of depth 0
  std::vector<int64_t> band_runs;   ///< [bands + 1]: first run of each band
  std::vector<int32_t> run_blocks;  ///< the blocks of all runs

 private:
  std::vector<Segment> segments_;
};

/// The tensors of one weight; pointers are borrowed.
struct MixedWeight {
  const MixedLayout& layout;
  const uint8_t* packed;   ///< [packed_bytes]
  const uint8_t* columns;  ///< [bands, blocks * 32]
  const uint16_t* scales;  ///< float16 bits, [tiles, 32]
  const uint16_t* order;   ///< [depth]: the input behind each stored one, below depth
  const uint8_t* tables;   ///< [kTableDepths, kTableEntries]: levels of each depth, repeated to fill it
  const float* steps;      ///< [kMaxDepth + 1]
  const float* bias;       ///< [outputs], or one value when shared_bias
  bool shared_bias;
  float gain;
};

/// x: [rows, depth], y: [rows, outputs]. False when scratch memory or the pool is refused.
bool MatMulMixed(const KernelTable& kernels, const MixedWeight& weight, Activations activations,
                 const float* x, int64_t rows, float* y, const Parallel& parallel);

}  // namespace onnxq::kernels
