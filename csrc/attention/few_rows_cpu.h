// Attention of up to four query rows at a time, straight from the cache: each key is loaded once
// for all of them, and nothing is packed.
#pragma once

#include "attention/block_cpu.h"

namespace memkernels::attention {
namespace {

// c += q . k over one chunk of kPair elements.
template <class T>
struct Chunk {
  Vec<Acc<T>> a, b;
  MK_INLINE void read(const T* row, int64_t d, int64_t dim, bool whole) {
    if (whole) {
      load_pair(row + d, a, b);
    } else {
      load_pair_tail(row + d, dim - d, a, b);
    }
  }
  static MK_INLINE const Acc<T>* q_at(const typename Math<T>::Unit* q, int64_t d) { return q + d; }
  MK_INLINE Vec<Acc<T>> dot(const Acc<T>* q, Vec<Acc<T>> c) const {
    c += load(q) * a;
    return c + load(q + kLanes<Acc<T>>) * b;
  }
};

#if defined(__AVX512BF16__)
template <>
struct Chunk<bf16> {
  VecU32 words;
  MK_INLINE void read(const bf16* row, int64_t d, int64_t dim, bool) {
    words = load_words(row, d, dim);
  }
  static MK_INLINE const float* q_at(const float* q, int64_t d) { return q + d / 2; }
  MK_INLINE Vec<float> dot(const float* q, Vec<float> c) const {
    return Bf16Pair::dot(load(q), bit_cast<Vec<float>>(words), c);
  }
};
#endif

// Keys a tile of dot products takes for R rows: one vector of sums.
template <class T, int R>
constexpr int kTileKeys = kLanes<Acc<T>> / (R == 3 ? 4 : R);

// scores[r][i] = q[r] . k[i] for R rows and kTileKeys keys.
template <class T, int R>
MK_INLINE void score_tile(const typename Math<T>::Unit* q, int64_t q_stride, const T* const* k,
                          int64_t dim, Acc<T>* scores) {
  using A = Acc<T>;
  constexpr int K = kTileKeys<T, R>;
  Vec<A> acc[kLanes<A>] = {};
  const auto step = [&](int64_t d, bool whole) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int i = 0; i < K; ++i) {
      Chunk<T> chunk;
      chunk.read(k[i], d, dim, whole);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        acc[r * K + i] = chunk.dot(Chunk<T>::q_at(q + r * q_stride, d), acc[r * K + i]);
      }
    }
  };
  int64_t d = 0;
  for (; d + kPair<T> <= dim; d += kPair<T>) step(d, true);
  if (d < dim) step(d, false);
  A sums[kLanes<A>];
  store(sums, sum_each<A>(acc));
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) memcpy(scores + r * kBlockKeys, sums + r * K, K * sizeof(A));
}

// Calls visit(Int<R>{}, r) for rows [r, r + R), with R up to 4, until all rows have been visited.
template <class A, class Visit>
MK_INLINE void for_row_groups(int64_t rows, const Visit& visit) {
  constexpr int kMost = kLanes<A> < 4 ? kLanes<A> : 4;
  constexpr int kThree = kMost < 3 ? 1 : 3;
  int64_t r = 0;
  for (; r + kMost <= rows; r += kMost) visit(Int<kMost>{}, r);
  if (rows - r == 3) visit(Int<kThree>{}, r);
  if (rows - r == 2) visit(Int<2>{}, r);
  if (rows - r == 1) visit(Int<1>{}, r);
}

// Keys whose values are added in one go, so that accumulators are loaded and stored once for all.
constexpr int kRunKeys = 8;

// Chunks of the head dimension a pass over those keys takes.
template <int R>
constexpr int kPassChunks = R == 1   ? 4
                            : R == 2 ? 2
                                     : 1;

// out[r] += sum_i weights[r][i] v[i] for R rows and up to kRunKeys keys, several chunks of the
// head dimension at a time so that there are enough independent sums. Calls before_pass() ahead of
// each.
template <class T, int R, class BeforePass>
MK_INLINE void add_values(const Acc<T>* weights, const T* const* v, int count, int64_t dim,
                          Acc<T>* out, int64_t out_stride, const BeforePass& before_pass) {
  using A = Acc<T>;
  constexpr int W = kLanes<A>;
  constexpr int C = kPassChunks<R>;
  const auto chunks = [&](int64_t d, auto num_chunks, bool whole) __attribute__((always_inline)) {
    constexpr int N = decltype(num_chunks)::value;
    before_pass();
    Vec<A> acc[R][N][2];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < N; ++c) {
        acc[r][c][0] = load(out + r * out_stride + d + c * 2 * W);
        acc[r][c][1] = load(out + r * out_stride + d + c * 2 * W + W);
      }
    }
    for (int i = 0; i < count; ++i) {
#pragma GCC unroll 8
      for (int c = 0; c < N; ++c) {
        Vec<A> a, b;
        if (whole) {
          load_pair(v[i] + d + c * 2 * W, a, b);
        } else {
          load_pair_tail(v[i] + d, dim - d, a, b);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const Vec<A> weight = splat(weights[r * kBlockKeys + i]);
          acc[r][c][0] += weight * a;
          acc[r][c][1] += weight * b;
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < N; ++c) {
        store(out + r * out_stride + d + c * 2 * W, acc[r][c][0]);
        store(out + r * out_stride + d + c * 2 * W + W, acc[r][c][1]);
      }
    }
  };
  int64_t d = 0;
  for (; d + C * kPair<T> <= dim; d += C * kPair<T>) chunks(d, Int<C>{}, true);
  for (; d + kPair<T> <= dim; d += kPair<T>) chunks(d, Int<1>{}, true);
  if (d < dim) chunks(d, Int<1>{}, false);
}

}  // namespace
}  // namespace memkernels::attention
