// Reductions, cuts and sorts of ranked keys in memory, by warps and blocks.
#pragma once

#include "core/cuda/ranked_keys.cuh"

namespace memkernels::selection::cuda {

using namespace memkernels::cuda;

struct Least {
  __device__ __forceinline__ Key operator()(Key x, Key y) const { return x < y ? x : y; }
};
struct Greatest {
  __device__ __forceinline__ Key operator()(Key x, Key y) const { return x > y ? x : y; }
};
struct Plus {
  __device__ __forceinline__ Key operator()(Key x, Key y) const { return x + y; }
};

template <class Join>
__device__ __forceinline__ Key warp_reduce(Key x, const Join& join) {
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    x = join(x, __shfl_xor_sync(kWholeWarp, x, lanes));
  }
  return x;
}

// Moves `least` to `most` of the best of more keys to the front, by a warp; returns how many, and
// from which key on.
__device__ __forceinline__ int keep_best(Key* keys, int count, int64_t least, int64_t most,
                                         Key& cut) {
  const int lane = threadIdx.x % 32;
  Key lowest = ~Key{0}, highest = 0;
#pragma unroll 4
  for (int i = lane; i < count; i += 32) {
    lowest = Least()(lowest, keys[i]);
    highest = Greatest()(highest, keys[i]);
  }
  cut = find_cut(warp_reduce(lowest, Least()), warp_reduce(highest, Greatest()), least, most,
                 [&](Key from) {
                   Key n = 0;
#pragma unroll 4
                   for (int i = lane; i < count; i += 32) n += keys[i] >= from;
                   return static_cast<int64_t>(warp_reduce(n, Plus()));
                 });
  int kept = 0;
  for (int first = 0; first < count; first += 32) {
    const Key key = first + lane < count ? keys[first + lane] : 0;
    const unsigned better = __ballot_sync(kWholeWarp, key >= cut);
    __syncwarp();  // all have read
    if (key >= cut) keys[kept + __popc(better & ((1u << lane) - 1))] = key;
    kept += __popc(better);
  }
  __syncwarp();
  return kept;
}

// Sorts n keys, largest first, by the block.
__device__ __forceinline__ void sort_keys(Key* keys, int64_t n) {
  for (int64_t size = 2; size < 2 * n; size *= 2) {
    for (int64_t step = size / 2; step > 0; step /= 2) {
      // Bitonic, but that the first step of each size mirrors: so no key moves past the end.
      const int64_t across = step == size / 2 ? size - 1 : step;
      for (int64_t i = threadIdx.x; 2 * i - (i & (step - 1)) < n; i += blockDim.x) {
        const int64_t a = 2 * i - (i & (step - 1)), b = a ^ across;
        if (b < n && keys[a] < keys[b]) {
          const Key lesser = keys[a];
          keys[a] = keys[b];
          keys[b] = lesser;
        }
      }
      __syncthreads();
    }
  }
}

}  // namespace memkernels::selection::cuda
