// Neighbouring elements of a row, moved by instructions of up to 16 bytes.
#pragma once

#include "core/cuda/device.cuh"

namespace memkernels::cuda {

template <class T, int kElements>
struct alignas(sizeof(T) * kElements < 16 ? sizeof(T) * kElements : 16) Chunk {
  T elements[kElements];
};

template <class T, int kElements>
__device__ __forceinline__ void load(const T* from, float (&x)[kElements]) {
  const auto chunk = *reinterpret_cast<const Chunk<T, kElements>*>(from);
#pragma unroll
  for (int i = 0; i < kElements; ++i) x[i] = widen(chunk.elements[i]);
}

template <class T, int kElements>
__device__ __forceinline__ void store(const float (&x)[kElements], T* to) {
  Chunk<T, kElements> chunk;
  if constexpr (kElements == 1) {
    narrow(x[0], chunk.elements[0]);
  } else {
#pragma unroll
    for (int i = 0; i < kElements; i += 2) store_pair(chunk.elements + i, x[i], x[i + 1]);
  }
  *reinterpret_cast<Chunk<T, kElements>*>(to) = chunk;
}

}  // namespace memkernels::cuda
