// Inputs of a weight whose columns have scales of their own, made ready for its products. Included by core.h,
// once per ISA, inside an anonymous namespace.

/// 2**(-i / 8); whole octaves are a matter of the exponent alone.
alignas(64) constexpr float kEighths[16] = {
    1.0f, 0.917004043f, 0.840896415f, 0.771105413f, 0.707106781f, 0.648419777f, 0.594603558f, 0.545253866f,
    0.5f, 0.458502022f, 0.420448208f, 0.385552706f, 0.353553391f, 0.324209889f, 0.297301779f, 0.272626933f};

void ScaleColumns(const float* x, const uint8_t* columns, float step, const int32_t* blocks, int64_t count,
                  float* out) {
  const Isa::ColumnScales scales(kEighths);
  const Isa::Floats by = Isa::Broadcast(step);
  for (int64_t i = 0; i < count; ++i, out += kBlockDepth) {
    const int64_t from = int64_t{blocks[i]} * kBlockDepth;
    for (int at = 0; at < kBlockDepth; at += Isa::kLanes) {
      const Isa::Floats scaled = Isa::Mul(Isa::LoadFloats(x + from + at), scales.Look(columns + from + at));
      Isa::StoreFloats(out + at, Isa::Mul(scaled, by));
    }
  }
}
