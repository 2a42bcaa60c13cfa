// What kernels reach the hardware through, so that their logic also runs on the host: tests/simt
// compiles them with functions of its own in the place of ptx.cuh.
#pragma once

#include "core/cuda/types.h"
#ifdef __CUDACC__
#include "core/cuda/ptx.cuh"
#else
#include "ptx_on_host.h"
#endif

namespace memkernels::cuda {

inline constexpr unsigned kWholeWarp = 0xffffffffu;
inline constexpr float kInfinity = __builtin_huge_valf();
inline constexpr float kGreatest = __FLT_MAX__;  // finite

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return bits_to_float(uint32_t{x.bits} << 16); }

__device__ __forceinline__ void narrow(float x, float& to) { to = x; }
template <class T>
__device__ __forceinline__ void narrow(float x, T& to) {
  to.bits = static_cast<uint16_t>(pack(T(), x, 0.f));
}

// Stores two elements side by side; `to` is aligned to them.
__device__ __forceinline__ void store_pair(float* to, float first, float second) {
  to[0] = first;
  to[1] = second;
}
template <class T>
__device__ __forceinline__ void store_pair(T* to, float first, float second) {
  *reinterpret_cast<uint32_t*>(to) = pack(T(), first, second);
}

// A float32 beside tensors of type T, or one of them.
template <class T>
__device__ __forceinline__ float companion_at(const void* data, bool is_float, int64_t offset) {
  return is_float ? static_cast<const float*>(data)[offset]
                  : widen(static_cast<const T*>(data)[offset]);
}

__device__ __forceinline__ int64_t integer_at(const Integers& t, int64_t offset) {
  return t.wide ? static_cast<const int64_t*>(t.data)[offset]
                : static_cast<const int32_t*>(t.data)[offset];
}
__device__ __forceinline__ int64_t at(const Integers& t, int64_t i) {
  return integer_at(t, i * t.stride);
}

// Integers in the order of the numbers they stand for, and back; -0 comes before 0.
__device__ __forceinline__ uint32_t ordered(float x) {
  const uint32_t bits = float_to_bits(x);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}
__device__ __forceinline__ float from_ordered(uint32_t x) {
  return bits_to_float(x ^ (x >> 31 ? 0x80000000u : 0xffffffffu));
}

__device__ __forceinline__ int64_t clamp(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

// The largest b in [0, n) whose value(b) <= x; value rises.
template <class Value>
__device__ __forceinline__ int64_t last_at_most(int64_t n, int64_t x, const Value& value) {
  int64_t b = 0, past = n;
  while (past - b > 1) {
    const int64_t middle = (b + past) / 2;
    (value(middle) <= x ? b : past) = middle;
  }
  return b;
}

template <class T>
__device__ __forceinline__ T warp_max(T x) {
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const T other = __shfl_xor_sync(kWholeWarp, x, lanes);
    x = other > x ? other : x;
  }
  return x;
}

}  // namespace memkernels::cuda
