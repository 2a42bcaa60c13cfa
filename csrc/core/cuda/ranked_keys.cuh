// Keys that rank what is found: by value, largest first, then by index. No two keys of a row are
// equal, so what the best are depends on no order in which they come.
#pragma once

#include "core/cuda/device.cuh"

namespace memkernels::cuda {

using Key = uint64_t;  // 0: nothing

__device__ __forceinline__ Key key_of(float value, uint32_t index) {
  return Key{ordered(value + 0.f)} << 32 | static_cast<uint32_t>(~index);  // no -0
}
__device__ __forceinline__ float value_of(Key key) {
  return from_ordered(static_cast<uint32_t>(key >> 32));
}
__device__ __forceinline__ uint32_t index_of(Key key) { return ~static_cast<uint32_t>(key); }

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

// The best keys that a warp has found, in shared memory, in any order.
struct BestKeys {
  Key* keys;
  int room, count;

  // Each lane's keys, but for zeros. True if what does not fit was dropped, all of it below
  // `floor`; `least` or more have stayed.
  template <int kWords>
  __device__ __forceinline__ bool add(Key (&fresh)[kWords], int least, Key& floor) {
    unsigned votes[kWords];
    int found = vote(fresh, votes);
    const bool full = count + found > room;
    if (full) {
      floor = cut(fresh, least, least + (room - least) / 2);
      vote(fresh, votes);
    }
    const unsigned lower = (1u << threadIdx.x % 32) - 1;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      if (fresh[w] != 0) keys[count + __popc(votes[w] & lower)] = fresh[w];
      count += __popc(votes[w]);
    }
    __syncwarp();
    return full;
  }

  // The `most` best, if there are more.
  __device__ __forceinline__ void keep(int most) {
    Key none[1] = {0};
    if (count > most) cut(none, most, most);
  }

  // Calls write(rank, key) for all, by some lane.
  template <class Write>
  __device__ __forceinline__ void rank(const Write& write) const {
    const int lane = threadIdx.x % 32;
    for (int first = 0; first < count; first += 32) {
      const Key key = first + lane < count ? keys[first + lane] : 0;
      int better = 0;
#pragma unroll 4
      for (int i = 0; i < count; ++i) better += keys[i] > key;
      if (key != 0) write(better, key);
    }
  }

 private:
  template <int kWords>
  static __device__ __forceinline__ int vote(const Key (&fresh)[kWords],
                                             unsigned (&votes)[kWords]) {
    int found = 0;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      votes[w] = __ballot_sync(kWholeWarp, fresh[w] != 0);
      found += __popc(votes[w]);
    }
    return found;
  }

  template <int kWords>
  __device__ __forceinline__ Key cut(Key (&fresh)[kWords], int least, int most) {
    const int lane = threadIdx.x % 32;
    unsigned lowest = ~0u, highest = 0;
    const auto see = [&](Key key) {
      const unsigned value = static_cast<unsigned>(key >> 32);
      if (key != 0 && value < lowest) lowest = value;
      if (value > highest) highest = value;
    };
    for (int i = lane; i < count; i += 32) see(keys[i]);
#pragma unroll
    for (int w = 0; w < kWords; ++w) see(fresh[w]);
    lowest = __reduce_min_sync(kWholeWarp, lowest);
    highest = __reduce_max_sync(kWholeWarp, highest);
    const Key floor =
        find_cut(Key{lowest} << 32, Key{highest} << 32 | 0xffffffffu, least, most, [&](Key from) {
          unsigned n = 0;
          for (int i = lane; i < count; i += 32) n += keys[i] >= from;
#pragma unroll
          for (int w = 0; w < kWords; ++w) n += fresh[w] >= from;
          return static_cast<int64_t>(__reduce_add_sync(kWholeWarp, n));
        });
    int kept = 0;
    for (int first = 0; first < count; first += 32) {
      const Key key = first + lane < count ? keys[first + lane] : 0;
      const unsigned better = __ballot_sync(kWholeWarp, key >= floor);
      __syncwarp();  // all have read
      if (key >= floor) keys[kept + __popc(better & ((1u << lane) - 1))] = key;
      kept += __popc(better);
    }
    count = kept;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      if (fresh[w] < floor) fresh[w] = 0;
    }
    __syncwarp();
    return floor;
  }
};

}  // namespace memkernels::cuda
