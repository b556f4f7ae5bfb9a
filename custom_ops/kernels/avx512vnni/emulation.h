// Plain loops under the names of the AVX-512 intrinsics that isa.h uses, for the tests: the kernel source is
// then checked on any processor. Never include it beside <immintrin.h>.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/compiler.h"
#include "kernels/half.h"

namespace {

// The compiler's portable vectors of the same sizes.
using __m512 = float __attribute__((vector_size(64)));
using __m512i = int32_t __attribute__((vector_size(64)));
using Unsigned16 = uint32_t __attribute__((vector_size(64)));
using Unsigned32 = uint16_t __attribute__((vector_size(64)));
struct __m256i {
  uint16_t half[16];
};
struct __m128i {
  uint8_t byte[16];
};

template <class T>
ONNXQ_INLINE T LoadFrom(const void* p) {
  T r;
  std::memcpy(&r, p, sizeof r);
  return r;
}

ONNXQ_INLINE __m512i _mm512_setzero_si512() { return __m512i{}; }
ONNXQ_INLINE __m512 _mm512_setzero_ps() { return __m512{}; }
ONNXQ_INLINE __m512i _mm512_loadu_si512(const void* p) { return LoadFrom<__m512i>(p); }
ONNXQ_INLINE __m512 _mm512_loadu_ps(const float* p) { return LoadFrom<__m512>(p); }
ONNXQ_INLINE __m256i _mm256_loadu_si256(const __m256i* p) { return LoadFrom<__m256i>(p); }
ONNXQ_INLINE __m128i _mm_loadu_si128(const __m128i* p) { return LoadFrom<__m128i>(p); }
ONNXQ_INLINE void _mm512_storeu_si512(void* p, __m512i v) { std::memcpy(p, &v, sizeof v); }
ONNXQ_INLINE void _mm512_storeu_ps(float* p, __m512 v) { std::memcpy(p, &v, sizeof v); }
ONNXQ_INLINE void _mm_storeu_si128(__m128i* p, __m128i v) { std::memcpy(p, &v, sizeof v); }

ONNXQ_INLINE __m512i _mm512_set1_epi32(int32_t v) { return __m512i{} + v; }
ONNXQ_INLINE __m512 _mm512_set1_ps(float v) { return __m512{v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v}; }
ONNXQ_INLINE __m512i _mm512_srli_epi32(__m512i v, unsigned n) { return __m512i(Unsigned16(v) >> n); }
ONNXQ_INLINE __m512i _mm512_slli_epi32(__m512i v, unsigned n) { return __m512i(Unsigned16(v) << n); }
ONNXQ_INLINE __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
ONNXQ_INLINE __m512i _mm512_or_si512(__m512i a, __m512i b) { return a | b; }
ONNXQ_INLINE __m512i _mm512_add_epi32(__m512i a, __m512i b) { return __m512i(Unsigned16(a) + Unsigned16(b)); }
ONNXQ_INLINE __m512i _mm512_sub_epi32(__m512i a, __m512i b) { return __m512i(Unsigned16(a) - Unsigned16(b)); }
ONNXQ_INLINE __m512i _mm512_max_epi32(__m512i a, __m512i b) { return a > b ? a : b; }
ONNXQ_INLINE __m512i _mm512_castps_si512(__m512 v) { return __m512i(v); }
ONNXQ_INLINE __m512 _mm512_castsi512_ps(__m512i v) { return __m512(v); }
ONNXQ_INLINE __m512 _mm512_permutexvar_ps(__m512i index, __m512 table) {
  __m512 r;
  for (int i = 0; i < 16; ++i) r[i] = table[index[i] & 15];
  return r;
}
ONNXQ_INLINE __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i codes, __m512i quad) {
  const Unsigned16 c = Unsigned16(codes);
  const Unsigned16 q = Unsigned16(quad);
  sum += __m512i(c & 255u) * (__m512i(q << 24) >> 24);
  sum += __m512i(c >> 8 & 255u) * (__m512i(q << 16) >> 24);
  sum += __m512i(c >> 16 & 255u) * (__m512i(q << 8) >> 24);
  return sum + __m512i(c >> 24) * (quad >> 24);
}
ONNXQ_INLINE __m512i _mm512_broadcast_i32x4(__m128i v) {
  __m512i r;
  for (int i = 0; i < 64; i += 16) std::memcpy(reinterpret_cast<uint8_t*>(&r) + i, v.byte, 16);
  return r;
}
ONNXQ_INLINE __m512i _mm512_shuffle_epi8(__m512i table, __m512i index) {
  uint8_t t[64], at[64], r[64];
  std::memcpy(t, &table, 64);
  std::memcpy(at, &index, 64);
  for (int i = 0; i < 64; ++i) r[i] = at[i] & 128 ? 0 : t[(i & 48) | (at[i] & 15)];
  return LoadFrom<__m512i>(r);
}
using __mmask64 = uint64_t;
ONNXQ_INLINE __mmask64 _mm512_movepi8_mask(__m512i v) {
  uint8_t byte[64];
  std::memcpy(byte, &v, 64);
  __mmask64 mask = 0;
  for (int i = 0; i < 64; ++i) mask |= uint64_t{byte[i]} >> 7 << i;
  return mask;
}
ONNXQ_INLINE __m512i _mm512_mask_mov_epi8(__m512i otherwise, __mmask64 mask, __m512i v) {
  uint8_t r[64], byte[64];
  std::memcpy(r, &otherwise, 64);
  std::memcpy(byte, &v, 64);
  for (int i = 0; i < 64; ++i) r[i] = mask >> i & 1 ? byte[i] : r[i];
  return LoadFrom<__m512i>(r);
}
ONNXQ_INLINE __m512i _mm512_mask_shuffle_epi8(__m512i otherwise, __mmask64 mask, __m512i table,
                                              __m512i index) {
  return _mm512_mask_mov_epi8(otherwise, mask, _mm512_shuffle_epi8(table, index));
}
ONNXQ_INLINE __m512 _mm512_cvtepi32_ps(__m512i v) { return __builtin_convertvector(v, __m512); }
ONNXQ_INLINE __m512i _mm512_cvtps_epi32(__m512 v) {
  __m512i r;
  for (int i = 0; i < 16; ++i) {
    const float x = v[i];
    if (!(x > -2147483648.0f && x < 2147483648.0f)) {
      r[i] = INT32_MIN;
      continue;
    }
    // Halves to even, as the default rounding mode does.
    const int64_t floor = int64_t(x) - (x < float(int64_t(x)));
    const double rest = double(x) - double(floor);
    r[i] = int32_t(floor + (rest > 0.5 || (rest == 0.5 && (floor & 1))));
  }
  return r;
}
ONNXQ_INLINE __m512 _mm512_cvtph_ps(__m256i v) {
  __m512 r;
  for (int i = 0; i < 16; ++i) r[i] = HalfToFloat(v.half[i]);
  return r;
}
ONNXQ_INLINE __m512i _mm512_cvtepu8_epi32(__m128i v) {
  __m512i r;
  for (int i = 0; i < 16; ++i) r[i] = v.byte[i];
  return r;
}
ONNXQ_INLINE __m512i _mm512_cvtepi8_epi16(__m256i v) {
  int8_t byte[32];
  int16_t r[32];
  std::memcpy(byte, &v, sizeof byte);
  for (int i = 0; i < 32; ++i) r[i] = byte[i];
  return LoadFrom<__m512i>(r);
}
ONNXQ_INLINE __m512i _mm512_set1_epi16(int16_t v) {
  return _mm512_set1_epi32(int32_t(uint16_t(v) * 0x10001u));
}
ONNXQ_INLINE __m512i _mm512_slli_epi16(__m512i v, unsigned n) {
  return __m512i(Unsigned32(v) << uint16_t(n));
}
ONNXQ_INLINE __m512i _mm512_add_epi16(__m512i a, __m512i b) { return __m512i(Unsigned32(a) + Unsigned32(b)); }
ONNXQ_INLINE __m512i _mm512_subs_epu16(__m512i a, __m512i b) {
  const Unsigned32 x = Unsigned32(a), y = Unsigned32(b);
  return __m512i(x > y ? x - y : Unsigned32{});
}
ONNXQ_INLINE __m256i _mm512_castsi512_si256(__m512i v) { return LoadFrom<__m256i>(&v); }
ONNXQ_INLINE __m256i _mm512_extracti64x4_epi64(__m512i v, int half) {
  uint8_t byte[64];
  std::memcpy(byte, &v, sizeof byte);
  return LoadFrom<__m256i>(byte + 32 * half);
}
ONNXQ_INLINE __m128i _mm512_cvtsepi32_epi8(__m512i v) {
  __m128i r;
  for (int i = 0; i < 16; ++i) r.byte[i] = uint8_t(int8_t(v[i] > 127 ? 127 : v[i] < -128 ? -128 : v[i]));
  return r;
}
ONNXQ_INLINE int32_t _mm512_reduce_add_epi32(__m512i v) {
  uint32_t s = 0;
  for (int i = 0; i < 16; ++i) s += uint32_t(v[i]);
  return int32_t(s);
}
ONNXQ_INLINE float _mm512_reduce_add_ps(__m512 v) {
  float s = 0.0f;
  for (int i = 0; i < 16; ++i) s += v[i];
  return s;
}
ONNXQ_INLINE int32_t _mm512_reduce_max_epi32(__m512i v) {
  int32_t m = v[0];
  for (int i = 1; i < 16; ++i) m = v[i] > m ? v[i] : m;
  return m;
}
ONNXQ_INLINE __m512 _mm512_add_ps(__m512 a, __m512 b) { return a + b; }
ONNXQ_INLINE __m512 _mm512_sub_ps(__m512 a, __m512 b) { return a - b; }
ONNXQ_INLINE __m512 _mm512_mul_ps(__m512 a, __m512 b) { return a * b; }
ONNXQ_INLINE __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) { return a * b + c; }
ONNXQ_INLINE __m512 _mm512_fmsub_ps(__m512 a, __m512 b, __m512 c) { return a * b - c; }
ONNXQ_INLINE __m512 _mm512_fnmadd_ps(__m512 a, __m512 b, __m512 c) { return c - a * b; }

}  // namespace
