#include <immintrin.h>

#include <cstdint>

#include "kernels/binary.h"
#include "kernels/compiler.h"
#include "kernels/problem.h"
#include "kernels/tables.h"

namespace {
#include "kernels/avx2/isa.h"

#include "kernels/unroll.h"

constexpr int kLookRows = 2;
constexpr double kBytesCost = 0.25;
constexpr double kFloatsCost = 1.0;

/// A chunk's table of bytes.
struct ByteTable {
  __m256i entries;
  explicit ONNXQ_INLINE ByteTable(const uint8_t* p)
      : entries(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))) {}
  ONNXQ_INLINE __m256i Look(__m256i keys) const { return _mm256_shuffle_epi8(entries, keys); }
  /// Bytes 2 i + 1 as 16 bits. A shift would do as well, but by the units that already look up.
  static ONNXQ_INLINE __m256i Odd(__m256i bytes) {
    return _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x0100));
  }
};

/// A chunk's table of floats.
struct FloatTable {
  __m256 first, second;
  explicit ONNXQ_INLINE FloatTable(const float* p)
      : first(_mm256_loadu_ps(p)), second(_mm256_loadu_ps(p + 8)) {}
  static ONNXQ_INLINE __m256i Load(const uint8_t* bytes) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
  }
  static ONNXQ_INLINE auto LoadBytes(const uint8_t* bytes) {
    return (uint32_t __attribute__((vector_size(32))))Load(bytes);
  }
  /// For each of eight bytes: the entries of its low and its high four bits.
  ONNXQ_INLINE void Look(const uint8_t* bytes, __m256& low, __m256& high) const {
    const __m256i keys = Load(bytes);
    low = Entry(keys);
    high = Entry(_mm256_srli_epi32(keys, 4));
  }

 private:
  /// Bits 0 to 2 are all that the permutation looks at.
  ONNXQ_INLINE __m256 Entry(__m256i keys) const {
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(first, keys), _mm256_permutevar8x32_ps(second, keys),
                            _mm256_castsi256_ps(_mm256_slli_epi32(keys, 28)));
  }
};

#include "kernels/binary_words.h"

#include "kernels/binary_core.h"
}  // namespace

namespace onnxq::kernels {
const BinaryKernels kAvx2Binary = MakeBinaryKernels(kAvx2);
}
