// Vectors of channels: the lanes of a scan, since tokens come one after another.
#pragma once

#include "core/cpu/simd.h"
#include "core/tensor.h"

namespace memkernels::scan {
namespace {

// The first `left` elements of a row that ends there, at most a vector; the rest read as zero.
template <class T>
MK_INLINE Vec<Acc<T>> load_some(const T* p, int64_t left) {
  constexpr int W = kLanes<Acc<T>>;
  if (left >= W) return load_ordered(p);
  T padded[W] = {};
  for (int64_t i = 0; i < left; ++i) padded[i] = p[i];
  return load_ordered(padded);
}

template <class T>
MK_INLINE void store_some(T* p, int64_t left, Vec<Acc<T>> v) {
  constexpr int W = kLanes<Acc<T>>;
  if (left >= W) {
    store_ordered(p, v);
  } else {
    T padded[W];
    store_ordered(padded, v);
    for (int64_t i = 0; i < left; ++i) p[i] = padded[i];
  }
}

// Element [i, j, k] of a tensor, of any further dimensions the first.
template <class T>
MK_INLINE T* at(const TensorView& t, int64_t i, int64_t j = 0, int64_t k = 0) {
  return static_cast<T*>(t.data) + i * t.stride[0] + j * t.stride[1] + k * t.stride[2];
}

}  // namespace
}  // namespace memkernels::scan
