// Tiles of rows of any length, a slice of each at a time.
#pragma once

#include "core/cuda/tile.cuh"

namespace memkernels::cuda {

inline constexpr int kSliceBytes = 128;

// Starts copying a slice of a row, by eight neighbouring threads; zeros follow its `dim` elements.
template <class T>
__device__ __forceinline__ void copy_slice(const Tile& tile, int i, const T* row, int dim,
                                           bool aligned, bool used) {
  constexpr int kChunk = 16 / sizeof(T), kLanes = kSliceBytes / 16;
  const int lane = threadIdx.x % kLanes;
  if (aligned) {
    const bool within = used && lane * kChunk < dim;
    copy_async_16(tile.chunk(i, lane), row + (within ? lane * kChunk : 0), within ? 16 : 0);
  } else {
    for (int c = lane; c < kLanes * kChunk; c += kLanes) {
      *tile.element<T>(i, c) = used && c < dim ? row[c] : T{};
    }
  }
}

}  // namespace memkernels::cuda
