// Keys that rank what is found: by value, largest first, then by index. No two keys of a row are
// equal, so what the best are depends on no order in which they come.
#pragma once

#include "core/cuda/device.cuh"

namespace memkernels::selection::cuda {

using namespace memkernels::cuda;

using Key = uint64_t;  // 0: nothing

__device__ __forceinline__ Key key_of(float value, uint32_t index) {
  return Key{ordered(value + 0.f)} << 32 | static_cast<uint32_t>(~index);  // no -0
}
__device__ __forceinline__ float value_of(Key key) {
  return from_ordered(static_cast<uint32_t>(key >> 32));
}
__device__ __forceinline__ uint32_t index_of(Key key) { return ~static_cast<uint32_t>(key); }

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

// A key from which on there are `least` to `most`, as count(key) says, of more keys than that, all
// within [lowest, highest]. Midpoints of values come closer at first than those of keys.
template <class Count>
__device__ __forceinline__ Key find_cut(Key lowest, Key highest, int64_t least, int64_t most,
                                        const Count& count) {
  Key low = lowest, past = highest + 1;
  for (int pass = 0;; ++pass) {
    Key middle = low + (past - low) / 2;
    const Key mean = Key{ordered(0.5f * value_of(low) + 0.5f * value_of(past))} << 32;
    if (pass < 12 && mean > low && mean < past) middle = mean;
    const int64_t n = count(middle);
    if (n >= least && n <= most) return middle;
    (n > most ? low : past) = middle;
  }
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
