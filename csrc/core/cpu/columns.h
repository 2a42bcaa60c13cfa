// Going along the columns of rows.
#pragma once

#include "core/cpu/simd.h"

namespace memkernels {
namespace {

struct WholeVector {
  template <class T>
  static MK_INLINE Vec<Acc<T>> load(const T* p) {
    return load_ordered(p);
  }
  template <class T>
  static MK_INLINE void store(T* p, Vec<Acc<T>> v) {
    store_ordered(p, v);
  }
};

// The first elements of a vector; the rest read as zero and are not written.
struct PartOfVector {
  int64_t count;

  template <class T>
  MK_INLINE Vec<Acc<T>> load(const T* p) const {
    T padded[kLanes<Acc<T>>] = {};
    for (int64_t i = 0; i < count; ++i) padded[i] = p[i];
    return load_ordered(padded);
  }
  template <class T>
  MK_INLINE void store(T* p, Vec<Acc<T>> v) const {
    T padded[kLanes<Acc<T>>];
    store_ordered(padded, v);
    for (int64_t i = 0; i < count; ++i) p[i] = padded[i];
  }
};

// The first `left` elements of a row that ends there, at most a vector; the rest read as zero and
// are not written.
template <class T>
MK_INLINE Vec<Acc<T>> load_some(const T* p, int64_t left) {
  return left >= kLanes<Acc<T>> ? load_ordered(p) : PartOfVector{left}.load(p);
}
template <class T>
MK_INLINE void store_some(T* p, int64_t left, Vec<Acc<T>> v) {
  if (left >= kLanes<Acc<T>>) {
    store_ordered(p, v);
  } else {
    PartOfVector{left}.store(p, v);
  }
}

// body(column, vector, chain) for each vector of A along `dim` columns. `vector` loads and stores
// there; chain, 0 or 1 in turn, is for sums that would wait for each other.
template <class A, class Body>
MK_INLINE void for_columns(int64_t dim, const Body& body) {
  constexpr int W = kLanes<A>;
  int64_t d = 0;
  for (; d + 2 * W <= dim; d += 2 * W) {
    body(d, WholeVector{}, 0);
    body(d + W, WholeVector{}, 1);
  }
  if (d + W <= dim) {
    body(d, WholeVector{}, 0);
    d += W;
  }
  if (d < dim) body(d, PartOfVector{dim - d}, 1);
}

// sums[n] = what add(column, vector, terms) adds to terms[n] along `dim` columns, lanes together.
// Stretches are summed apart: one long chain would round more.
template <class A, int N, class Add>
MK_INLINE void sum_columns(int64_t dim, A* sums, const Add& add) {
  constexpr int64_t kStretch = 256;
  Vec<A> total[N] = {};
  for (int64_t begin = 0; begin < dim; begin += kStretch) {
    Vec<A> terms[2][N] = {};
    const int64_t columns = dim - begin < kStretch ? dim - begin : kStretch;
    for_columns<A>(columns, [&](int64_t i, auto vector, int chain) __attribute__((always_inline)) {
      add(begin + i, vector, terms[chain]);
    });
    for (int n = 0; n < N; ++n) total[n] += terms[0][n] + terms[1][n];
  }
  for (int n = 0; n < N; ++n) sums[n] = sum<A>(total[n]);
}

}  // namespace
}  // namespace memkernels
