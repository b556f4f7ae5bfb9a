// AVX-512 F/BW/VL/VNNI as a vector trait. Included inside an anonymous namespace.

struct Isa {
  using Bytes = __m512i;
  using Ints = __m512i;
  using Partial = __m512i;  // vpdpbusd adds straight into int32
  using Floats = __m512;

  static constexpr int kLanes = 16;
  static constexpr int kDirectBits = 8;
  static constexpr int kWideBits = 9;     // never: sums are 32 bits wide
  static constexpr int kCentredBits = 9;  // never, likewise
  static constexpr int kWideRows = 1;
  static constexpr int kGemvVectors = 2;
  static constexpr int kGemmRows = 8;  // 8 x 2 sums leave half of the registers to the compiler
  static constexpr int kGemmVectors = 2;
  static constexpr int kFloatRows = 12;
  static constexpr int kFloatVectors = 2;
  static constexpr int Depth(int) { return 32; }  // int32 sums outlast any segment

  static ONNXQ_INLINE Bytes ZeroBytes() { return _mm512_setzero_si512(); }
  static ONNXQ_INLINE Bytes Load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static ONNXQ_INLINE void Store(uint8_t* p, Bytes v) { _mm512_storeu_si512(p, v); }
  template <int kRight>
  static ONNXQ_INLINE Bytes Shift(Bytes v) {
    if constexpr (kRight > 0) return _mm512_srli_epi32(v, kRight);
    if constexpr (kRight < 0) return _mm512_slli_epi32(v, -kRight);
    return v;
  }
  template <uint32_t kMask>
  static ONNXQ_INLINE Bytes And(Bytes v) {
    if constexpr (kMask == 0xffffffffu) return v;
    return _mm512_and_si512(v, _mm512_set1_epi32(int(kMask)));
  }
  static ONNXQ_INLINE Bytes Or(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
  static ONNXQ_INLINE Bytes Quad(const int8_t* p) {
    int32_t quad;
    __builtin_memcpy(&quad, p, sizeof quad);
    return _mm512_set1_epi32(quad);
  }

  /// A table of bytes in registers.
  template <int kEntries>
  struct Levels {
    __m512i part[kEntries / 16];
    explicit ONNXQ_INLINE Levels(const uint8_t* entries) {
      for (int i = 0; i < kEntries / 16; ++i)
        part[i] = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(entries) + i));
    }
    ONNXQ_INLINE Bytes Look(Bytes low) const { return _mm512_shuffle_epi8(part[0], low); }
    /// Bit 4 of an index is the highest bit of a byte of bit4, as bit 5 is in bit5.
    ONNXQ_INLINE Bytes Look(Bytes low, Bytes bit4) const { return Half<0>(low, _mm512_movepi8_mask(bit4)); }
    ONNXQ_INLINE Bytes Look(Bytes low, Bytes bit4, Bytes bit5) const {
      const __mmask64 odd = _mm512_movepi8_mask(bit4);
      return _mm512_mask_mov_epi8(Half<0>(low, odd), _mm512_movepi8_mask(bit5), Half<2>(low, odd));
    }

   private:
    template <int kFirst>
    ONNXQ_INLINE Bytes Half(Bytes low, __mmask64 odd) const {
      return _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(part[kFirst], low), odd, part[kFirst + 1], low);
    }
  };

  /// 2**(-c / 8) of bytes c, from the first such values.
  struct ColumnScales {
    __m512 eighths;
    explicit ONNXQ_INLINE ColumnScales(const float* values) : eighths(_mm512_loadu_ps(values)) {}
    ONNXQ_INLINE Floats Look(const uint8_t* columns) const {
      const __m512i c = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(columns)));
      // Bits 0 to 3 are all that the permutation looks at; the others count octaves, which are exponents.
      const __m512 fraction = _mm512_permutexvar_ps(c, eighths);
      const __m512i octaves = _mm512_slli_epi32(_mm512_and_si512(c, _mm512_set1_epi32(~15)), 20);
      return _mm512_castsi512_ps(_mm512_sub_epi32(_mm512_castps_si512(fraction), octaves));
    }
  };

  static ONNXQ_INLINE Partial ZeroPartial() { return _mm512_setzero_si512(); }
  static ONNXQ_INLINE Partial Dot(Partial sum, Bytes codes, Bytes quad) {
    return _mm512_dpbusd_epi32(sum, codes, quad);
  }
  static ONNXQ_INLINE Ints ZeroInts() { return _mm512_setzero_si512(); }
  template <int kWeight>
  static ONNXQ_INLINE Ints Collect(Ints total, Partial sum) {
    static_assert(kWeight == 1, "one limb holds every code");
    return _mm512_add_epi32(total, sum);
  }
  static ONNXQ_INLINE Ints AsInts(Bytes v) { return v; }

  static ONNXQ_INLINE Floats ZeroFloats() { return _mm512_setzero_ps(); }
  static ONNXQ_INLINE Floats Broadcast(float v) { return _mm512_set1_ps(v); }
  static ONNXQ_INLINE Floats ToFloats(Ints v) { return _mm512_cvtepi32_ps(v); }
  static ONNXQ_INLINE Floats LoadFloats(const float* p) { return _mm512_loadu_ps(p); }
  static ONNXQ_INLINE void StoreFloats(float* p, Floats v) { _mm512_storeu_ps(p, v); }
  static ONNXQ_INLINE Floats LoadHalfFloats(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  /// 2 * kLanes 8-bit floats read as halves: E4M3 in the place of a half's exponent and mantissa is 2**-8 of
  /// what it is with an exponent bias of 7. E5M2 would fill the whole exponent, whose top means infinity
  /// there; half of it fits: 2**-1 of what it is with a bias of 15.
  template <int kMantissaBits>
  static ONNXQ_INLINE void Float8(const uint8_t* codes, Floats* out) {
    const __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
    __m512i half = _mm512_and_si512(_mm512_slli_epi16(wide, 7), _mm512_set1_epi16(int16_t(0xbf80)));
    if constexpr (kMantissaBits == 2) {
      // Subnormals and the first binade are halved as they are; above, the exponent falls by one: one more
      // shift to the left, less 0x400.
      const __m512i magnitude = _mm512_and_si512(half, _mm512_set1_epi16(0x3f80));
      half = _mm512_add_epi16(half, _mm512_subs_epu16(magnitude, _mm512_set1_epi16(0x400)));
    }
    out[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(half));
    out[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1));
  }
  static ONNXQ_INLINE Floats LoadByteFloats(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static ONNXQ_INLINE Floats Add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static ONNXQ_INLINE Floats Sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
  static ONNXQ_INLINE Floats Mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static ONNXQ_INLINE Floats MulAdd(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static ONNXQ_INLINE Floats MulSub(Floats a, Floats b, Floats c) { return _mm512_fmsub_ps(a, b, c); }
  static ONNXQ_INLINE Floats NegMulAdd(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }

  static ONNXQ_INLINE void AbsMax32(const float* x, Ints& top) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    top = _mm512_max_epi32(top, _mm512_and_si512(_mm512_loadu_si512(x), magnitude));
    top = _mm512_max_epi32(top, _mm512_and_si512(_mm512_loadu_si512(x + kLanes), magnitude));
  }
  /// The float that the largest of the numbers is the bits of.
  static ONNXQ_INLINE float LargestFloat(Ints v) {
    const int32_t bits = _mm512_reduce_max_epi32(v);
    float largest;
    __builtin_memcpy(&largest, &bits, sizeof largest);
    return largest;
  }
  static ONNXQ_INLINE float Sum(Floats v) { return _mm512_reduce_add_ps(v); }
  static ONNXQ_INLINE int32_t Sum(Ints v) { return _mm512_reduce_add_epi32(v); }
  static ONNXQ_INLINE void Quantize32(const float* x, float inverse, int8_t* codes, Ints& sum) {
    const __m512 by = _mm512_set1_ps(inverse);
    const __m512i low = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), by));
    const __m512i high = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + kLanes), by));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm512_cvtsepi32_epi8(low));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + kLanes), _mm512_cvtsepi32_epi8(high));
    sum = _mm512_add_epi32(sum, _mm512_add_epi32(low, high));
  }
};
