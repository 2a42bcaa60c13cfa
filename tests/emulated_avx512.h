// Stand-ins for the AVX-512 instructions that the kernels name, so that the AVX-512 variants run,
// slowly, on a CPU with AVX2: compiled in by -DMEMKERNELS_EMULATE_AVX512=ON, for tests only. The
// rest of those kernels is 64-byte vector arithmetic, which the compiler splits by itself.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define __AVX512F__ 1
#if defined(MEMKERNELS_EMULATE_BF16)
#define __AVX512BF16__ 1
#endif

namespace {

inline float emulated_bf16(uint32_t bits) {
  float x;
  bits <<= 16;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

// Per lane: c + a[1] b[1] + a[0] b[0].
inline __m512 emulated_dpbf16(__m512 c, __m512bh a, __m512bh b) {
  uint32_t x[16], y[16];
  float z[16];
  memcpy(x, &a, sizeof(x));
  memcpy(y, &b, sizeof(y));
  memcpy(z, &c, sizeof(z));
  for (int i = 0; i < 16; ++i) {
    z[i] += emulated_bf16(x[i] >> 16) * emulated_bf16(y[i] >> 16);
    z[i] += emulated_bf16(x[i] & 0xffff) * emulated_bf16(y[i] & 0xffff);
  }
  memcpy(&c, z, sizeof(c));
  return c;
}

// 32 bfloat16: `low` rounded, then `high`.
inline __m512bh emulated_cvtne2ps(__m512 high, __m512 low) {
  uint32_t from[32];
  uint16_t to[32];
  memcpy(from, &low, 64);
  memcpy(from + 16, &high, 64);
  for (int i = 0; i < 32; ++i) {
    const uint32_t f = from[i];
    const bool nan = (f & 0x7fffffff) > 0x7f800000;
    to[i] = static_cast<uint16_t>((nan ? f | 0x400000 : f + 0x7fff + ((f >> 16) & 1)) >> 16);
  }
  __m512bh out;
  memcpy(&out, to, sizeof(out));
  return out;
}

inline __m512i emulated_cvtepu16(__m256i half) {
  uint16_t from[16];
  uint32_t to[16];
  memcpy(from, &half, sizeof(from));
  for (int i = 0; i < 16; ++i) to[i] = from[i];
  __m512i out;
  memcpy(&out, to, sizeof(out));
  return out;
}

inline __m512 emulated_cvtph(__m256i half) {
  __m128i parts[2];
  __m256 wide[2];
  memcpy(parts, &half, sizeof(parts));
  for (int i = 0; i < 2; ++i) wide[i] = _mm256_cvtph_ps(parts[i]);
  __m512 out;
  memcpy(&out, wide, sizeof(out));
  return out;
}

inline __m256i emulated_cvtps(__m512 x, int) {
  __m256 parts[2];
  __m128i half[2];
  memcpy(parts, &x, sizeof(parts));
  for (int i = 0; i < 2; ++i) half[i] = _mm256_cvtps_ph(parts[i], _MM_FROUND_TO_NEAREST_INT);
  __m256i out;
  memcpy(&out, half, sizeof(out));
  return out;
}

inline uint32_t emulated_movepi32_mask(__m512i x) {
  uint32_t lanes[16], bits = 0;
  memcpy(lanes, &x, sizeof(x));
  for (int i = 0; i < 16; ++i) bits |= lanes[i] >> 31 << i;
  return bits;
}

template <class Byte>
inline __m512i emulated_widen(__m128i bytes) {
  Byte in[16];
  int32_t out[16];
  memcpy(in, &bytes, sizeof(in));
  for (int i = 0; i < 16; ++i) out[i] = in[i];
  __m512i x;
  memcpy(&x, out, sizeof(x));
  return x;
}

}  // namespace

#define MK_KEEP(v) (void)(v)
#undef _mm512_cvtps_ph
#define _mm512_dpbf16_ps emulated_dpbf16
#define _mm512_cvtne2ps_pbh emulated_cvtne2ps
#define _mm512_cvtepu16_epi32 emulated_cvtepu16
#define _mm512_cvtph_ps emulated_cvtph
#define _mm512_cvtps_ph emulated_cvtps
#define _mm512_movepi32_mask emulated_movepi32_mask
#define _mm512_cvtepi8_epi32 emulated_widen<int8_t>
#define _mm512_cvtepu8_epi32 emulated_widen<uint8_t>
