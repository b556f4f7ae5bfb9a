#include "kernels/gather.h"

#include <cstring>

#include "kernels/compiler.h"
#include "kernels/half.h"

namespace onnxq::kernels {
namespace {
#include "kernels/fields.h"

template <int Bits, int Quad>
ONNXQ_INLINE uint32_t QuadCodes(const uint32_t* rows) {
  uint32_t code = 0;
  const auto add = [&](const Field field) ONNXQ_INLINE_LAMBDA {
    const uint32_t row = rows[field.row];
    code |=
        (field.shift >= 0 ? row >> field.shift : row << -field.shift) & 0x01010101u * uint32_t(field.mask);
  };
  add(PlaneField(Bits, 0, 0, Bits, Quad));
  if constexpr (PlaneCount(Bits) > 1) add(PlaneField(Bits, 1, 0, Bits, Quad));
  if constexpr (PlaneCount(Bits) > 2) add(PlaneField(Bits, 2, 0, Bits, Quad));
  return code;
}

template <int Bits>
void DecodeBlock(const uint8_t* block, float* out, float scale, float zero) {
  uint32_t rows[Bits];
  for (int i = 0; i < Bits; ++i) std::memcpy(&rows[i], block + i * kRowBytes, 4);
  const uint32_t codes[kQuads] = {
      QuadCodes<Bits, 0>(rows), QuadCodes<Bits, 1>(rows), QuadCodes<Bits, 2>(rows), QuadCodes<Bits, 3>(rows),
      QuadCodes<Bits, 4>(rows), QuadCodes<Bits, 5>(rows), QuadCodes<Bits, 6>(rows), QuadCodes<Bits, 7>(rows)};
  for (int q = 0; q < kQuads; ++q)
    for (int j = 0; j < 4; ++j) out[4 * q + j] = scale * (float(codes[q] >> 8 * j & 255u) - zero);
}

using Decode = void (*)(const uint8_t*, float*, float, float);
constexpr Decode kDecode[kMaxBits + 1] = {nullptr,        DecodeBlock<1>, DecodeBlock<2>,
                                          DecodeBlock<3>, DecodeBlock<4>, DecodeBlock<5>,
                                          DecodeBlock<6>, DecodeBlock<7>, DecodeBlock<8>};

}  // namespace

void DecodeRow(const Weight& w, int64_t row, float* out) {
  const int64_t tile = row / kTileOutputs;
  const int64_t lane = row % kTileOutputs;
  const uint8_t* block = w.packed + tile * w.blocks * w.bits * kRowBytes + lane * 4;
  const float fraction = 1.0f / float(1 << (8 - w.bits));
  for (int64_t b = 0; b < w.blocks; ++b, block += w.bits * kRowBytes) {
    const int64_t side = (tile * w.groups + b / w.group_blocks) * kTileOutputs + lane;
    const float scale = HalfToFloat(w.scales[side]) * w.gain;
    const float zero = float(w.zeros[w.shared_zero ? 0 : side]) * fraction;
    const int64_t left = w.depth - b * kBlockDepth;
    if (left >= kBlockDepth) {
      kDecode[w.bits](block, out + b * kBlockDepth, scale, zero);
    } else {
      float last[kBlockDepth];
      kDecode[w.bits](block, last, scale, zero);
      std::memcpy(out + b * kBlockDepth, last, size_t(left) * sizeof(float));
    }
  }
}

}  // namespace onnxq::kernels
