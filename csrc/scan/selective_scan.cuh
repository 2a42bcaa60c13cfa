// What the CUDA kernels of selective_scan and of its step have in common.
#pragma once

#include "core/cuda/chunk.cuh"
#include "scan/gates.cuh"
#include "scan/selective_scan_cuda.h"

namespace memkernels::scan::cuda {

inline constexpr float kLn2 = 0.69314718055994531f;

// A as the powers of 2 take it; what is finite stays finite.
__device__ __forceinline__ float to_base_2(float A) {
  const float scaled = A * kLog2e;
  const bool overflows = fabsf(scaled) == kInfinity && fabsf(A) <= kGreatest;
  return overflows ? copysignf(kGreatest, A) : scaled;
}

// log(1 + e) for e from 0 to 1: 2 atanh(e / (2 + e)), to 1e-8 of itself.
__device__ __forceinline__ float log_1_plus(float e) {
  const float s = e * reciprocal_fast(2.f + e), s2 = s * s;
  float p = 1 / 13.f;
  p = p * s2 + 1 / 11.f;
  p = p * s2 + 1 / 9.f;
  p = p * s2 + 1 / 7.f;
  p = p * s2 + 1 / 5.f;
  p = p * s2 + 1 / 3.f;
  p = p * s2 + 1.f;
  return 2.f * s * p;
}
__device__ __forceinline__ float softplus(float x) {
  return fmaxf(x, 0.f) + log_1_plus(exp2_fast(-kLog2e * fabsf(x)));
}

// The state behind a part: A in base 2, what was before the part, and what its tokens left. Growth
// meets it by halves, as it may be beyond all numbers where the state behind is not; that of
// nothing is nothing, even without bounds.
__device__ __forceinline__ float behind(float A, float deltas, float before, float left) {
  const float half = exp2_fast(0.5f * A * deltas);
  return before == 0.f ? left : fmaf(half, half * before, left);
}

// Four states of a row, from `first` on; zeros follow the last.
__device__ __forceinline__ void load_states(const float* row, int first, int states,
                                            float (&x)[kLaneStates]) {
  const float* const from = row + first;
  if (first + kLaneStates <= states && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
    load(from, x);
  } else {
#pragma unroll
    for (int i = 0; i < kLaneStates; ++i) x[i] = first + i < states ? from[i] : 0.f;
  }
}
__device__ __forceinline__ void store_states(const float (&x)[kLaneStates], float* row, int first,
                                             int states) {
  float* const to = row + first;
  if (first + kLaneStates <= states && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    store(x, to);
  } else {
#pragma unroll
    for (int i = 0; i < kLaneStates; ++i) {
      if (first + i < states) to[i] = x[i];
    }
  }
}

}  // namespace memkernels::scan::cuda
