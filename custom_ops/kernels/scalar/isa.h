// Plain C++ as a vector trait of four lanes, on the compiler's own portable vectors: they become SSE2 on
// x86-64 and NEON on Arm, and compile quickly. Included inside an anonymous namespace.

using Unsigned4 = uint32_t __attribute__((vector_size(16)));
using Int4 = int32_t __attribute__((vector_size(16)));
using Float4 = float __attribute__((vector_size(16)));

template <class T>
ONNXQ_INLINE T LoadAs(const void* p) {
  T v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

struct Isa {
  using Bytes = Unsigned4;
  using Ints = Int4;
  using Partial = Int4;
  using Floats = Float4;

  static constexpr int kLanes = 4;
  static constexpr int kDirectBits = 8;
  static constexpr int kWideBits = 9;     // never: sums are 32 bits wide
  static constexpr int kCentredBits = 9;  // never, likewise
  static constexpr int kWideRows = 1;
  static constexpr int kGemvVectors = 2;
  static constexpr int kGemmRows = 2;
  static constexpr int kGemmVectors = 2;
  static constexpr int kFloatRows = 4;
  static constexpr int kFloatVectors = 2;
  static constexpr int Depth(int) { return 32; }

  static ONNXQ_INLINE Bytes ZeroBytes() { return Bytes{}; }
  static ONNXQ_INLINE Bytes Load(const uint8_t* p) { return LoadAs<Bytes>(p); }
  static ONNXQ_INLINE void Store(uint8_t* p, Bytes v) { __builtin_memcpy(p, &v, sizeof v); }
  template <int kRight>
  static ONNXQ_INLINE Bytes Shift(Bytes v) {
    if constexpr (kRight >= 0)
      return v >> kRight;
    else
      return v << -kRight;
  }
  template <uint32_t kMask>
  static ONNXQ_INLINE Bytes And(Bytes v) {
    return v & kMask;
  }
  static ONNXQ_INLINE Bytes Or(Bytes a, Bytes b) { return a | b; }
  static ONNXQ_INLINE Bytes Quad(const int8_t* p) { return Bytes{} + LoadAs<uint32_t>(p); }

  /// A table of bytes.
  template <int kEntries>
  struct Levels {
    const uint8_t* table;
    explicit ONNXQ_INLINE Levels(const uint8_t* entries) : table(entries) {}
    ONNXQ_INLINE Bytes Look(Bytes low) const {
      Bytes out{};
      for (int i = 0; i < kLanes; ++i)
        for (int bit = 0; bit < 32; bit += 8) out[i] |= uint32_t{table[low[i] >> bit & 255u]} << bit;
      return out;
    }
    /// Bit 4 of an index is the highest bit of a byte of bit4, as bit 5 is in bit5.
    ONNXQ_INLINE Bytes Look(Bytes low, Bytes bit4) const { return Look(low | (bit4 >> 3 & 0x10101010u)); }
    ONNXQ_INLINE Bytes Look(Bytes low, Bytes bit4, Bytes bit5) const {
      return Look(low | (bit5 >> 2 & 0x20202020u), bit4);
    }
  };

  /// 2**(-c / 8) of bytes c, from the first such values.
  struct ColumnScales {
    const float* eighths;
    explicit ONNXQ_INLINE ColumnScales(const float* values) : eighths(values) {}
    ONNXQ_INLINE Floats Look(const uint8_t* columns) const {
      const Unsigned4 c{columns[0], columns[1], columns[2], columns[3]};
      const Floats fraction{eighths[c[0] & 7], eighths[c[1] & 7], eighths[c[2] & 7], eighths[c[3] & 7]};
      // The bits above count octaves, which are exponents.
      return Floats(Unsigned4(fraction) - ((c & ~7u) << 20));
    }
  };

  static ONNXQ_INLINE Partial ZeroPartial() { return Partial{}; }
  static ONNXQ_INLINE Partial Dot(Partial sum, Bytes codes, Bytes quad) {
    // The shift up and the arithmetic shift down give each input its sign.
    sum += Ints(codes & 255u) * (Ints(quad << 24) >> 24);
    sum += Ints(codes >> 8 & 255u) * (Ints(quad << 16) >> 24);
    sum += Ints(codes >> 16 & 255u) * (Ints(quad << 8) >> 24);
    return sum + Ints(codes >> 24) * (Ints(quad) >> 24);
  }
  static ONNXQ_INLINE Ints ZeroInts() { return Ints{}; }
  template <int kWeight>
  static ONNXQ_INLINE Ints Collect(Ints total, Partial sum) {
    return total + kWeight * sum;
  }
  static ONNXQ_INLINE Ints AsInts(Bytes v) { return Ints(v); }

  static ONNXQ_INLINE Floats ZeroFloats() { return Floats{}; }
  static ONNXQ_INLINE Floats Broadcast(float v) { return Floats{v, v, v, v}; }
  static ONNXQ_INLINE Floats ToFloats(Ints v) { return __builtin_convertvector(v, Floats); }
  static ONNXQ_INLINE Floats LoadFloats(const float* p) { return LoadAs<Floats>(p); }
  static ONNXQ_INLINE void StoreFloats(float* p, Floats v) { __builtin_memcpy(p, &v, sizeof v); }
  static ONNXQ_INLINE Floats LoadHalfFloats(const uint16_t* p) {
    return Floats{HalfToFloat(p[0]), HalfToFloat(p[1]), HalfToFloat(p[2]), HalfToFloat(p[3])};
  }
  /// 2 * kLanes 8-bit floats read as halves, as on the other processors: E4M3 in the place of a half's
  /// exponent and mantissa is 2**-8 of what it is with an exponent bias of 7. E5M2 would fill the whole
  /// exponent, whose top means infinity there; half of it fits: 2**-1 of what it is with a bias of 15.
  template <int kMantissaBits>
  static ONNXQ_INLINE void Float8(const uint8_t* codes, Floats* out) {
    for (int i = 0; i < 2; ++i, codes += kLanes) {
      const Unsigned4 code{codes[0], codes[1], codes[2], codes[3]};
      Unsigned4 half = (code & 0x7fu) << 7;
      // Subnormals and the first binade are halved as they are; above, the exponent falls by one: one more
      // shift to the left, less 0x400.
      if constexpr (kMantissaBits == 2) half += half > 0x400u ? half - 0x400u : Unsigned4{};
      // The subnormals of halves are whole numbers of 2**-24.
      const Floats subnormal = ToFloats(Ints(half)) * 5.9604644775390625e-8f;
      const Unsigned4 bits = half < 0x400u ? Unsigned4(subnormal) : (half << 13) + (112u << 23);
      out[i] = Floats(bits | (code & 0x80u) << 24);
    }
  }
  static ONNXQ_INLINE Floats LoadByteFloats(const uint8_t* p) {
    return Floats{float(p[0]), float(p[1]), float(p[2]), float(p[3])};
  }
  static ONNXQ_INLINE Floats Add(Floats a, Floats b) { return a + b; }
  static ONNXQ_INLINE Floats Sub(Floats a, Floats b) { return a - b; }
  static ONNXQ_INLINE Floats Mul(Floats a, Floats b) { return a * b; }
  static ONNXQ_INLINE Floats MulAdd(Floats a, Floats b, Floats c) { return a * b + c; }
  static ONNXQ_INLINE Floats MulSub(Floats a, Floats b, Floats c) { return a * b - c; }
  static ONNXQ_INLINE Floats NegMulAdd(Floats a, Floats b, Floats c) { return c - a * b; }

  static ONNXQ_INLINE void AbsMax32(const float* x, Ints& top) {
    for (int i = 0; i < 32; i += kLanes) {
      const Ints magnitude = LoadAs<Ints>(x + i) & 0x7fffffff;
      top = magnitude > top ? magnitude : top;
    }
  }
  /// The float that the largest of the numbers is the bits of.
  static ONNXQ_INLINE float LargestFloat(Ints v) {
    const int32_t low = v[0] > v[1] ? v[0] : v[1];
    const int32_t high = v[2] > v[3] ? v[2] : v[3];
    return LoadAs<float>(low > high ? &low : &high);
  }
  static ONNXQ_INLINE float Sum(Floats v) { return (v[0] + v[2]) + (v[1] + v[3]); }
  static ONNXQ_INLINE int32_t Sum(Ints v) { return v[0] + v[1] + v[2] + v[3]; }
  static ONNXQ_INLINE void Quantize32(const float* x, float inverse, int8_t* codes, Ints& sum) {
    // Adding and taking off 1.5 * 2**23 leaves the nearest whole number, halves to even.
    constexpr float kRound = 12582912.0f;
    for (int i = 0; i < 32; ++i) {
      const float scaled = x[i] * inverse;
      // NaN becomes 0 here: NaN and infinite inputs reach the output through the scale.
      const float known = scaled == scaled ? scaled : 0.0f;
      const float clamped = known > 127.0f ? 127.0f : known < -127.0f ? -127.0f : known;
      const float rounded = (clamped + kRound) - kRound;
      codes[i] = int8_t(rounded);
      sum[i % kLanes] += codes[i];
    }
  }
};
