// What several kernels of scans compute of an element.
#pragma once

#include "core/cuda/device.cuh"

namespace memkernels::scan::cuda {

using namespace memkernels::cuda;

inline constexpr float kLog2e = 1.4426950408889634f;

__device__ __forceinline__ float sigmoid(float x) {
  const float e = exp2_fast(-kLog2e * fabsf(x));
  return (x < 0.f ? e : 1.f) * reciprocal_fast(1.f + e);
}

}  // namespace memkernels::scan::cuda
