#ifdef ONNXQ_EMULATE_AVX512
#include "kernels/avx512vnni/emulation.h"
#else
#include <immintrin.h>
#endif

#include <cstdint>

#include "kernels/binary.h"
#include "kernels/compiler.h"
#include "kernels/problem.h"
#include "kernels/tables.h"

namespace {
#include "kernels/avx512vnni/isa.h"

#include "kernels/unroll.h"

constexpr int kLookRows = 4;
constexpr double kBytesCost = 0.25;
constexpr double kFloatsCost = 1.0;

/// The tables of bytes of two chunks, each twice.
struct ByteTable {
  __m512i entries;
  explicit ONNXQ_INLINE ByteTable(const uint8_t* p) : entries(_mm512_loadu_si512(p)) {}
  ONNXQ_INLINE __m512i Look(__m512i keys) const { return _mm512_shuffle_epi8(entries, keys); }
  /// Bytes 2 i + 1 as 16 bits.
  static ONNXQ_INLINE __m512i Odd(__m512i bytes) {
    using Words = uint16_t __attribute__((vector_size(64)));
    return __m512i(Words(bytes) >> 8);
  }
};

/// A chunk's table of floats.
struct FloatTable {
  __m512 entries;
  explicit ONNXQ_INLINE FloatTable(const float* p) : entries(_mm512_loadu_ps(p)) {}
  static ONNXQ_INLINE __m512i Load(const uint8_t* bytes) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  }
  static ONNXQ_INLINE auto LoadBytes(const uint8_t* bytes) {
    return (uint32_t __attribute__((vector_size(64))))Load(bytes);
  }
  /// For each of sixteen bytes: the entries of its low and its high four bits, all that the permutation looks
  /// at.
  ONNXQ_INLINE void Look(const uint8_t* bytes, __m512& low, __m512& high) const {
    const __m512i keys = Load(bytes);
    low = _mm512_permutexvar_ps(keys, entries);
    high = _mm512_permutexvar_ps(_mm512_srli_epi32(keys, 4), entries);
  }
};

#include "kernels/binary_words.h"

#include "kernels/binary_core.h"
}  // namespace

namespace onnxq::kernels {
#ifdef ONNXQ_EMULATE_AVX512
const BinaryKernels kAvx512VnniEmulatedBinary = MakeBinaryKernels(kAvx512VnniEmulated);
#else
const BinaryKernels kAvx512VnniBinary = MakeBinaryKernels(kAvx512Vnni);
#endif
}  // namespace onnxq::kernels
