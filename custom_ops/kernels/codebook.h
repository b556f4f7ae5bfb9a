// Codes that look their levels up in a small table, together with the codes in front of them
// (CodebookMatMul). Included by core.h, once per ISA, inside an anonymous namespace.
//
// The index of a level is the code in its lowest bits, the code 32 outputs before it above that, and so on up
// to `Window` bits. The code 32 outputs before lies in the tile before at the same offset, so an index is
// fields of a few loads put together, and a level is a byte shuffle of a register that holds the table.

/// `Bits` bits a weight, index of `Window` bits; levels of 7 bits.
template <int Bits, int Window>
struct Codebook {
  static constexpr int kBits = Bits;
  static constexpr int kLevelBits = kTableLevelBits;
  static constexpr int kLimbs = 1;
  static constexpr int kTiles =
      (Window + Bits - 1) / Bits;         // the tile and those before it that an index needs
  static constexpr int kShuffleBits = 4;  // of the index that one byte shuffle takes

  const uint8_t* tiles[kTiles];
  Isa::Levels<(Window > kShuffleBits ? 1 << Window : 1 << kShuffleBits)> levels;

  ONNXQ_INLINE Codebook(const Weight& w, int64_t tile) : levels(w.table) {
    for (int i = 0; i < kTiles; ++i) {
      tiles[i] = w.packed + tile * w.blocks * Bits * kRowBytes;
      tile = tile == 0 ? w.tiles - 1 : tile - 1;
    }
  }

  /// f(Constant<quad>, Constant<vector>, Constant<0>, levels) for all levels of a block in `Vectors` vectors.
  template <int Vectors, class F>
  ONNXQ_INLINE void Each(int64_t at, const F& f) const {
    // Vector by vector: the rows of all of them would not fit the registers.
    Unroll<Vectors>([&](auto vector) ONNXQ_INLINE_LAMBDA {
      const int64_t from = at + vector.value * kVectorBytes;
      Unroll<kQuads>([&](auto index) ONNXQ_INLINE_LAMBDA {
        constexpr int q = decltype(index)::value;
        if constexpr (PlaneCount(Bits) > 1) {
          f(index, vector, Constant<0>{}, Look<q>(from, LowIndex<q, 0x01010101u>(from)));
        } else if constexpr (q % (8 / Bits) < 4 / Bits) {
          // Two quads whose fields lie 4 bits apart in the same bytes: one nibble each.
          constexpr int other = q + 4 / Bits;
          const Isa::Bytes both = LowIndex<q, 0x11111111u>(from);
          f(index, vector, Constant<0>{}, Look<q>(from, Isa::template And<0x0f0f0f0fu>(both)));
          f(Constant<other>{}, vector, Constant<0>{},
            Look<other>(from, Isa::template And<0x0f0f0f0fu>(Isa::template Shift<4>(both))));
        }
      });
    });
  }

  /// f(Constant<quad>, Constant<vector>, Constant<j>, levels of input 4 * quad + j as floats).
  template <int Vectors, class F>
  ONNXQ_INLINE void EachFloat(int64_t at, const F& f) const {
    Each<Vectors>(at, [&](auto quad, auto vector, auto, Isa::Bytes bytes) ONNXQ_INLINE_LAMBDA {
      Unroll<4>([&](auto j) ONNXQ_INLINE_LAMBDA {
        const Isa::Bytes level = Isa::template And<255>(Isa::template Shift<8 * j.value>(bytes));
        f(quad, vector, j, Isa::ToFloats(Isa::AsInts(level)));
      });
    });
  }

 private:
  /// The index bits that one shuffle takes, at the places in a byte that `Places` has ones.
  template <int Quad, uint32_t Places>
  ONNXQ_INLINE Isa::Bytes LowIndex(int64_t at) const {
    Isa::Bytes index = Isa::ZeroBytes();
    Unroll<kTiles>([&](auto tile) ONNXQ_INLINE_LAMBDA {
      constexpr int place = decltype(tile)::value * Bits;
      constexpr int width = Min(Bits, Min(kShuffleBits, Window) - place);
      Unroll<PlaneCount(Bits)>([&](auto plane) ONNXQ_INLINE_LAMBDA {
        constexpr Field field = PlaneField(Bits, decltype(plane)::value, 0, width, Quad);
        if constexpr (width > 0 && field.mask != 0) {
          constexpr uint32_t mask = Places * uint32_t(field.mask << place);
          const Isa::Bytes row = Isa::Load(tiles[tile.value] + at + field.row * kRowBytes);
          const Isa::Bytes part = Isa::template And<mask>(Isa::template Shift<field.shift - place>(row));
          index = place == 0 && decltype(plane)::value == 0 ? part : Isa::Or(index, part);
        }
      });
    });
    return index;
  }

  /// Bytes whose highest bit is bit `Bit` of the index; the others are anything.
  template <int Quad, int Bit>
  ONNXQ_INLINE Isa::Bytes HighIndex(int64_t at) const {
    Isa::Bytes index = Isa::ZeroBytes();
    Unroll<PlaneCount(Bits)>([&](auto plane) ONNXQ_INLINE_LAMBDA {
      constexpr Field field = PlaneField(Bits, decltype(plane)::value, Bit % Bits, 1, Quad);
      if constexpr (field.mask != 0) {
        index =
            Isa::template Shift<field.shift - 7>(Isa::Load(tiles[Bit / Bits] + at + field.row * kRowBytes));
      }
    });
    return index;
  }

  template <int Quad>
  ONNXQ_INLINE Isa::Bytes Look(int64_t at, Isa::Bytes low) const {
    if constexpr (Window <= kShuffleBits) {
      return levels.Look(low);
    } else if constexpr (Window == 5) {
      return levels.Look(low, HighIndex<Quad, 4>(at));
    } else {
      return levels.Look(low, HighIndex<Quad, 4>(at), HighIndex<Quad, 5>(at));
    }
  }
};
