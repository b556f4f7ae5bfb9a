// Sums of one tile of outputs on their way to and from y. Included inside an anonymous namespace, once per
// ISA.

constexpr int kTileVectors = kTileOutputs / Isa::kLanes;

/// Writes gain * acc + bias for the outputs of one tile that exist.
ONNXQ_INLINE void Finish(const Affine& w, int64_t tile, const float* acc, float* y_row) {
  const int64_t first = tile * kTileOutputs;
  const int64_t count = Min<int64_t>(kTileOutputs, w.outputs - first);
  float* y = y_row + first;
  if (count == kTileOutputs) {
    const Isa::Floats gain = Isa::Broadcast(w.gain);
    for (int i = 0; i < kTileVectors; ++i) {
      const int at = i * Isa::kLanes;
      const Isa::Floats bias =
          w.shared_bias ? Isa::Broadcast(w.bias[0]) : Isa::LoadFloats(w.bias + first + at);
      Isa::StoreFloats(y + at, Isa::MulAdd(Isa::LoadFloats(acc + at), gain, bias));
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) y[i] = acc[i] * w.gain + w.bias[w.shared_bias ? 0 : first + i];
}

ONNXQ_INLINE void CopyTile(const float* from, float* to) {
  for (int i = 0; i < kTileOutputs; i += Isa::kLanes) Isa::StoreFloats(to + i, Isa::LoadFloats(from + i));
}

/// Partial sums of `rows` rows of one tile lie in y itself between two stretches of K.
ONNXQ_INLINE void LoadSums(const Affine& w, int64_t tile, int64_t row, int64_t rows, bool fresh,
                           const Output& out, float* sums) {
  const int64_t count = fresh ? 0 : Min<int64_t>(kTileOutputs, w.outputs - tile * kTileOutputs);
  const float* y = out.y + row * out.stride;
  for (int64_t r = 0; r < rows; ++r, y += out.stride, sums += kTileOutputs) {
    if (count == kTileOutputs) {
      CopyTile(y + tile * kTileOutputs, sums);
    } else {
      for (int64_t i = 0; i < kTileOutputs; ++i) sums[i] = i < count ? y[tile * kTileOutputs + i] : 0.0f;
    }
  }
}

ONNXQ_INLINE void StoreSums(const Affine& w, int64_t tile, int64_t row, int64_t rows, bool last,
                            const float* sums, const Output& out) {
  const int64_t count = Min<int64_t>(kTileOutputs, w.outputs - tile * kTileOutputs);
  float* y = out.y + row * out.stride;
  for (int64_t r = 0; r < rows; ++r, y += out.stride, sums += kTileOutputs) {
    if (last) {
      Finish(w, tile, sums, y);
    } else if (count == kTileOutputs) {
      CopyTile(sums, y + tile * kTileOutputs);
    } else {
      for (int64_t i = 0; i < count; ++i) y[tile * kTileOutputs + i] = sums[i];
    }
  }
}
