// csrc/core/cuda/ptx.cuh for the host.
#pragma once

#include "core/cuda/types.h"
#include "device.h"

namespace memkernels::cuda {

inline char* shared_memory() { return simt::shared_memory(); }
inline void copy_async_16(void* to, const void* from, int valid = 16, SIMT_SITE) {
  simt::copy_async(to, from, 16, valid, SIMT_HERE);
}
inline void commit_copies() { simt::commit_copies(); }
template <int kGroups>
inline void wait_copies() {
  simt::wait_copies(kGroups);
}
inline void load_matrices_4(uint32_t (&r)[4], const void* row, SIMT_SITE) {
  simt::load_matrices<4, false>(r, row, SIMT_HERE);
}
inline void load_matrices_2(uint32_t (&r)[2], const void* row, SIMT_SITE) {
  simt::load_matrices<2, false>(r, row, SIMT_HERE);
}
inline void load_matrices_4_transposed(uint32_t (&r)[4], const void* row, SIMT_SITE) {
  simt::load_matrices<4, true>(r, row, SIMT_HERE);
}
inline void multiply_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                          SIMT_SITE) {
  simt::multiply<16, 2>("mma.bf16", c, a, b, simt::WidenBf16(), SIMT_HERE);
}
inline void multiply_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SIMT_SITE) {
  simt::multiply<16, 2>("mma.f16", c, a, b, simt::WidenF16(), SIMT_HERE);
}
inline void multiply_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                          SIMT_SITE) {
  simt::multiply<8, 1>("mma.tf32", c, a, b, simt::WidenTf32(), SIMT_HERE);
}
inline float exp2_fast(float x) { return exp2f(x); }
inline float reciprocal_fast(float x) { return 1 / x; }
inline float relu(float x) { return x < 0 ? 0 : x; }
inline float bits_to_float(uint32_t bits) { return simt::bits_as<float>(bits); }
inline uint32_t float_to_bits(float x) { return simt::bits_as<uint32_t>(x); }
inline float widen(f16 x) { return simt::WidenF16()(x.bits); }
inline uint32_t pack(bf16, float first, float second) {
  return simt::round_bf16(first) | simt::round_bf16(second) << 16;
}
inline uint32_t pack(f16, float first, float second) {
  return simt::round_f16(first) | simt::round_f16(second) << 16;
}
inline uint32_t round_tf32(float x) {
  if (x != x) return 0x7fffffff;
  return (float_to_bits(x) + 0x1000u) & ~0x1fffu;
}

}  // namespace memkernels::cuda
