// AVX2 + FMA + F16C as a vector trait. Included inside an anonymous namespace.

struct Isa {
  using Bytes = __m256i;
  using Ints = __m256i;
  using Partial = __m256i;  // sixteen int16 sums of two products each
  using Floats = __m256;

  static constexpr int kLanes = 8;
  static constexpr int kDirectBits = 7;   // 255 * 127 * 2 would saturate maddubs
  static constexpr int kWideBits = 8;     // there two limbs of maddubs cost more
  static constexpr int kCentredBits = 7;  // there 16 bits take one product, but two of levels around zero
  static constexpr int kWideRows = 4;     // 4 x 2 sums: with more the compiler spills some of them
  static constexpr int kGemvVectors = 4;
  static constexpr int kGemmRows = 6;  // 6 x 2 sums, 2 codes, 1 quad, 1 product: all sixteen registers
  static constexpr int kGemmVectors = 2;
  static constexpr int kFloatRows = 6;
  static constexpr int kFloatVectors = 2;

  /// How many maddubs results of codes this wide and int8 inputs fit an int16, rounded to a power of two.
  static constexpr int Depth(int code_bits) {
    const int fits = 32767 / (((1 << code_bits) - 1) * 128 * 2);
    return fits >= 32 ? 32 : fits >= 8 ? 8 : fits >= 4 ? 4 : fits >= 2 ? 2 : 1;
  }

  static ONNXQ_INLINE Bytes ZeroBytes() { return _mm256_setzero_si256(); }
  static ONNXQ_INLINE Bytes Load(const uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static ONNXQ_INLINE void Store(uint8_t* p, Bytes v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v);
  }
  template <int kRight>
  static ONNXQ_INLINE Bytes Shift(Bytes v) {
    if constexpr (kRight > 0) return _mm256_srli_epi32(v, kRight);
    if constexpr (kRight < 0) return _mm256_slli_epi32(v, -kRight);
    return v;
  }
  template <uint32_t kMask>
  static ONNXQ_INLINE Bytes And(Bytes v) {
    if constexpr (kMask == 0xffffffffu) return v;
    return _mm256_and_si256(v, _mm256_set1_epi32(int(kMask)));
  }
  static ONNXQ_INLINE Bytes Or(Bytes a, Bytes b) { return _mm256_or_si256(a, b); }
  static ONNXQ_INLINE Bytes Quad(const int8_t* p) {
    int32_t quad;
    __builtin_memcpy(&quad, p, sizeof quad);
    return _mm256_set1_epi32(quad);
  }

  /// A table of bytes in registers.
  template <int kEntries>
  struct Levels {
    __m256i part[kEntries / 16];
    explicit ONNXQ_INLINE Levels(const uint8_t* entries) {
      for (int i = 0; i < kEntries / 16; ++i)
        part[i] = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(entries) + i));
    }
    ONNXQ_INLINE Bytes Look(Bytes low) const { return _mm256_shuffle_epi8(part[0], low); }
    /// Bit 4 of an index is the highest bit of a byte of bit4, as bit 5 is in bit5.
    ONNXQ_INLINE Bytes Look(Bytes low, Bytes bit4) const { return Half<0>(low, bit4); }
    ONNXQ_INLINE Bytes Look(Bytes low, Bytes bit4, Bytes bit5) const {
      return _mm256_blendv_epi8(Half<0>(low, bit4), Half<2>(low, bit4), bit5);
    }

   private:
    template <int kFirst>
    ONNXQ_INLINE Bytes Half(Bytes low, Bytes bit4) const {
      return _mm256_blendv_epi8(_mm256_shuffle_epi8(part[kFirst], low),
                                _mm256_shuffle_epi8(part[kFirst + 1], low), bit4);
    }
  };

  /// 2**(-c / 8) of bytes c, from the first such values.
  struct ColumnScales {
    __m256 eighths;
    explicit ONNXQ_INLINE ColumnScales(const float* values) : eighths(_mm256_loadu_ps(values)) {}
    ONNXQ_INLINE Floats Look(const uint8_t* columns) const {
      const __m256i c = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(columns)));
      // Bits 0 to 2 are all that the permutation looks at; the others count octaves, which are exponents.
      const __m256 fraction = _mm256_permutevar8x32_ps(eighths, c);
      const __m256i octaves = _mm256_slli_epi32(_mm256_and_si256(c, _mm256_set1_epi32(~7)), 20);
      return _mm256_castsi256_ps(_mm256_sub_epi32(_mm256_castps_si256(fraction), octaves));
    }
  };

  static ONNXQ_INLINE Partial ZeroPartial() { return _mm256_setzero_si256(); }
  static ONNXQ_INLINE Partial Dot(Partial sum, Bytes codes, Bytes quad) {
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, quad));
  }
  static ONNXQ_INLINE Ints ZeroInts() { return _mm256_setzero_si256(); }
  template <int kWeight>
  static ONNXQ_INLINE Ints Collect(Ints total, Partial sum) {
    return _mm256_add_epi32(total, _mm256_madd_epi16(sum, _mm256_set1_epi16(kWeight)));
  }
  static ONNXQ_INLINE Ints AsInts(Bytes v) { return v; }

  static ONNXQ_INLINE Bytes Pair(int32_t pair) { return _mm256_set1_epi32(pair); }
  static ONNXQ_INLINE Ints DotWide(Ints sum, Bytes codes, Bytes pair) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(codes, pair));
  }
  /// 32 int8 as int16: bytes 0 and 2 of each four to `even`, bytes 1 and 3 to `odd`.
  static ONNXQ_INLINE void Widen32(const int8_t* x, int32_t* even, int32_t* odd) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(even), _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(odd), _mm256_srai_epi16(v, 8));
  }

  /// For each pair of quads of 32 inputs: two int16, -64 times the sum of inputs 0 and 1 of both, and of 2
  /// and 3.
  static ONNXQ_INLINE void Starts32(const int8_t* x, int32_t* starts) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    __m256i sum = _mm256_maddubs_epi16(_mm256_set1_epi8(onnxq::kernels::kStartMiddle), v);
    sum = _mm256_sub_epi16(_mm256_setzero_si256(), _mm256_add_epi16(sum, _mm256_shuffle_epi32(sum, 0xb1)));
    sum = _mm256_permutevar8x32_epi32(sum, _mm256_setr_epi32(0, 2, 4, 6, 0, 0, 0, 0));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(starts), _mm256_castsi256_si128(sum));
  }

  static ONNXQ_INLINE Floats ZeroFloats() { return _mm256_setzero_ps(); }
  static ONNXQ_INLINE Floats Broadcast(float v) { return _mm256_set1_ps(v); }
  static ONNXQ_INLINE Floats ToFloats(Ints v) { return _mm256_cvtepi32_ps(v); }
  static ONNXQ_INLINE Floats LoadFloats(const float* p) { return _mm256_loadu_ps(p); }
  static ONNXQ_INLINE void StoreFloats(float* p, Floats v) { _mm256_storeu_ps(p, v); }
  static ONNXQ_INLINE Floats LoadHalfFloats(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  /// 2 * kLanes 8-bit floats read as halves: E4M3 in the place of a half's exponent and mantissa is 2**-8 of
  /// what it is with an exponent bias of 7. E5M2 would fill the whole exponent, whose top means infinity
  /// there; half of it fits: 2**-1 of what it is with a bias of 15.
  template <int kMantissaBits>
  static ONNXQ_INLINE void Float8(const uint8_t* codes, Floats* out) {
    const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    __m256i half = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(int16_t(0xbf80)));
    if constexpr (kMantissaBits == 2) {
      // Subnormals and the first binade are halved as they are; above, the exponent falls by one: one more
      // shift to the left, less 0x400.
      const __m256i magnitude = _mm256_and_si256(half, _mm256_set1_epi16(0x3f80));
      half = _mm256_add_epi16(half, _mm256_subs_epu16(magnitude, _mm256_set1_epi16(0x400)));
    }
    out[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(half));
    out[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1));
  }
  static ONNXQ_INLINE Floats LoadByteFloats(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static ONNXQ_INLINE Floats Add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static ONNXQ_INLINE Floats Sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
  static ONNXQ_INLINE Floats Mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static ONNXQ_INLINE Floats MulAdd(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static ONNXQ_INLINE Floats MulSub(Floats a, Floats b, Floats c) { return _mm256_fmsub_ps(a, b, c); }
  static ONNXQ_INLINE Floats NegMulAdd(Floats a, Floats b, Floats c) { return _mm256_fnmadd_ps(a, b, c); }

  static ONNXQ_INLINE void AbsMax32(const float* x, Ints& top) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    for (int i = 0; i < 32; i += kLanes) {
      const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
      top = _mm256_max_epi32(top, _mm256_and_si256(bits, magnitude));
    }
  }
  /// The float that the largest of the numbers is the bits of.
  static ONNXQ_INLINE float LargestFloat(Ints v) {
    __m128i t = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    t = _mm_max_epi32(t, _mm_shuffle_epi32(t, 0x4e));
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_max_epi32(t, _mm_shuffle_epi32(t, 0xb1))));
  }
  static ONNXQ_INLINE float Sum(Floats v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  static ONNXQ_INLINE int32_t Sum(Ints v) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
  }
  static ONNXQ_INLINE void Quantize32(const float* x, float inverse, int8_t* codes, Ints& sum) {
    const __m256 by = _mm256_set1_ps(inverse);
    const auto round = [&](int at) ONNXQ_INLINE_LAMBDA {
      return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + at), by));
    };
    const __m256i low = _mm256_packs_epi32(round(0), round(8));
    const __m256i high = _mm256_packs_epi32(round(16), round(24));
    // The two packs leave groups of four in the order 0 2 4 6 1 3 5 7.
    const __m256i bytes =
        _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), bytes);
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes);
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
};
