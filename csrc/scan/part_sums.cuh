// Sums over parts that blocks have left apart, in their order.
#pragma once

#include "core/cuda/device.cuh"

namespace memkernels::scan::cuda {

using namespace memkernels::cuda;

inline constexpr int kAddWarps = 8;
inline constexpr int kAddThreads = 32 * kAddWarps;
inline constexpr int kAddBytes = kAddThreads * sizeof(float);  // of shared memory

// Number i of all parts, a lane's, of which each warp adds up every eighth. The first warp has it.
__device__ __forceinline__ float sum_of_parts(const float* parts, int64_t num_parts,
                                              int64_t numbers, int64_t i) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float sum = 0.f;
  if (i < numbers) {
#pragma unroll 8
    for (int64_t part = warp; part < num_parts; part += kAddWarps) {
      sum += parts[part * numbers + i];
    }
  }
  const auto sums = reinterpret_cast<float*>(shared_memory());  // [warps, lanes]
  sums[threadIdx.x] = sum;
  __syncthreads();
  sum = 0.f;
  for (int w = 0; w < kAddWarps; ++w) sum += sums[w * 32 + lane];
  return sum;
}

}  // namespace memkernels::scan::cuda
