// Rows of tensors as accumulators.
#pragma once

#include "core/cpu/columns.h"
#include "core/tensor.h"

namespace memkernels::scan {
namespace {

// Element [i, j, k] of a tensor, of any further dimensions the first.
template <class T>
MK_INLINE T* at(const TensorView& t, int64_t i, int64_t j = 0, int64_t k = 0) {
  return static_cast<T*>(t.data) + i * t.stride[0] + j * t.stride[1] + k * t.stride[2];
}

// `dim` elements, then zeros up to `padded`, or to the end of a vector.
template <class T>
MK_INLINE void read_row(const T* row, int64_t dim, Acc<T>* out, int64_t padded = 0) {
  using A = Acc<T>;
  for_columns<A>(dim, [&](int64_t c, auto vector, int)
                          __attribute__((always_inline)) { store(out + c, vector.load(row + c)); });
  for (int64_t c = round_up(dim, kLanes<A>); c < padded; c += kLanes<A>) store(out + c, Vec<A>{});
}

template <class A>
A dot(const A* a, const A* b, int64_t n) {
  A out;
  sum_columns<A, 1>(n, &out, [&](int64_t c, auto vector, Vec<A>* s) __attribute__((always_inline)) {
    s[0] += vector.load(a + c) * vector.load(b + c);
  });
  return out;
}

template <class A>
A inverse_norm(const A* row, int64_t dim) {
  return A(1) / static_cast<A>(__builtin_sqrt(dot(row, row, dim) + A(1e-6)));
}

}  // namespace
}  // namespace memkernels::scan
