// Codes that are their own levels (LowBitMatMul). Included by core.h, once per ISA, inside an anonymous
// namespace.

/// Bits [Low, Low + Width) of the codes of quad `Quad`, a byte each.
template <int Bits, int Low, int Width, int Quad>
ONNXQ_INLINE Isa::Bytes Codes(const uint8_t* block) {
  Isa::Bytes code = Isa::ZeroBytes();
  Unroll<PlaneCount(Bits)>([&](auto plane) ONNXQ_INLINE_LAMBDA {
    constexpr Field field = PlaneField(Bits, decltype(plane)::value, Low, Width, Quad);
    if constexpr (field.mask != 0) {
      constexpr uint32_t mask = 0x01010101u * field.mask;
      const Isa::Bytes row = Isa::Load(block + field.row * kRowBytes);
      const Isa::Bytes part = Isa::template And<mask>(Isa::template Shift<field.shift>(row));
      code = decltype(plane)::value == 0 ? part : Isa::Or(code, part);
    }
  });
  return code;
}

/// The four codes of quad `Quad` as floats: f(Constant<j>, codes of input 4 * Quad + j) for j = 0 .. 3.
template <int Bits, int Quad, class F>
ONNXQ_INLINE void FloatCodes(const uint8_t* block, const F& f) {
  if constexpr (PlaneCount(Bits) == 1) {
    // Straight from the row: one shift and one mask a code.
    constexpr Field field = PlaneField(Bits, 0, 0, Bits, Quad);
    const Isa::Bytes row = Isa::Load(block + field.row * kRowBytes);
    Unroll<4>([&](auto byte) ONNXQ_INLINE_LAMBDA {
      const Isa::Bytes code =
          Isa::template And<field.mask>(Isa::template Shift<8 * byte.value + field.shift>(row));
      f(byte, Isa::ToFloats(Isa::AsInts(code)));
    });
  } else {
    const Isa::Bytes codes = Codes<Bits, 0, Bits, Quad>(block);
    Unroll<4>([&](auto byte) ONNXQ_INLINE_LAMBDA {
      const Isa::Bytes code = Isa::template And<255>(Isa::template Shift<8 * byte.value>(codes));
      f(byte, Isa::ToFloats(Isa::AsInts(code)));
    });
  }
}

/// One tile of a weight of `Bits` bits.
template <int Bits>
struct Uniform {
  static constexpr int kBits = Bits;
  static constexpr int kLevelBits = Bits;
  static constexpr int kLimbs = Bits <= Isa::kDirectBits ? 1 : 2;

  const uint8_t* packed;

  ONNXQ_INLINE Uniform(const Weight& w, int64_t tile)
      : packed(w.packed + tile * w.blocks * Bits * kRowBytes) {}

  /// f(Constant<quad>, Constant<vector>, Constant<limb>, codes) for all codes of a block in `Vectors`
  /// vectors.
  template <int Vectors, int Limbs = kLimbs, class F>
  ONNXQ_INLINE void Each(int64_t at, const F& f) const {
    Unroll<kQuads>([&](auto quad) ONNXQ_INLINE_LAMBDA {
      Unroll<Vectors>([&](auto vector) ONNXQ_INLINE_LAMBDA {
        Unroll<Limbs>([&](auto limb) ONNXQ_INLINE_LAMBDA {
          constexpr int l = decltype(limb)::value;
          constexpr int width = Limbs == 1 ? Bits : (l == 0 ? 4 : Bits - 4);
          f(quad, vector, limb,
            Codes<Bits, 4 * l, width, decltype(quad)::value>(packed + at + vector.value * kVectorBytes));
        });
      });
    });
  }

  /// f(Constant<quad>, Constant<vector>, Constant<j>, codes of input 4 * quad + j as floats).
  template <int Vectors, class F>
  ONNXQ_INLINE void EachFloat(int64_t at, const F& f) const {
    Unroll<kQuads>([&](auto quad) ONNXQ_INLINE_LAMBDA {
      Unroll<Vectors>([&](auto vector) ONNXQ_INLINE_LAMBDA {
        FloatCodes<Bits, decltype(quad)::value>(packed + at + vector.value * kVectorBytes,
                                                [&](auto j, Isa::Floats codes)
                                                    ONNXQ_INLINE_LAMBDA { f(quad, vector, j, codes); });
      });
    });
  }
};
