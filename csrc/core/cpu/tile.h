// A blocked matrix product for matrices that live in cache: C[M, N] (+)= A[M, K] * B[K, N],
// with C in float32 (float64 for float64). Attention, product keys and scans are made of it.
//
// K is counted in units. A unit is one element (F32, F64), or two consecutive bfloat16 elements
// that one instruction multiplies and adds (Bf16Pair, where the CPU has dot products).
//
// C is taken up where it stands, so that products of slices of K give the bits of the whole.
//
// Operands, in units:
//   A  element (i, k) at a[i * row_stride + k * col_stride]; M is a multiple of kTileRows
//   B  panels of kPanel columns: [N / kPanel][K][kPanel]
//   C  row-major, ldc elements a row; N is a multiple of kPanel
// The pack_* functions make them from rows of any supported type; missing rows read as zero.
// Cost: 2 M N K flops; A is broadcast once a panel, a panel of B stays in L1.
#pragma once

#include "core/cpu/simd.h"

namespace memkernels {
namespace {

template <class A>
constexpr int kPanel = 2 * kLanes<A>;
constexpr int kTileRows = kRegisters == 32 ? 8 : 6;

template <class A_>
struct Scalar {
  using A = A_;
  using Unit = A_;
  static constexpr int kElements = 1;
  static MK_INLINE Vec<A> fma(Unit a, Vec<A> b, Vec<A> c) { return c + splat(a) * b; }
};
using F32 = Scalar<float>;
using F64 = Scalar<double>;

#if defined(__AVX512BF16__)
struct Bf16Pair {
  using A = float;
  using Unit = float;  // carries the bits of two bfloat16
  static constexpr int kElements = 2;
  static MK_INLINE Vec<float> fma(Unit a, Vec<float> b, Vec<float> c) {
    return dot(splat_bits(a), b, c);
  }
  static MK_INLINE Vec<float> dot(Vec<float> a, Vec<float> b, Vec<float> c) {
    return bit_cast<Vec<float>>(
        _mm512_dpbf16_ps(bit_cast<__m512>(c), bit_cast<__m512bh>(a), bit_cast<__m512bh>(b)));
  }
  // Not splat: its addition could quiet a NaN or flush the pattern.
  static MK_INLINE Vec<float> splat_bits(float a) {
    return bit_cast<Vec<float>>(VecU32{} + bit_cast<uint32_t>(a));
  }
};
#endif

// How products of T are computed here.
template <class T>
struct MathOf {
  using type = F32;
};
template <>
struct MathOf<double> {
  using type = F64;
};
#if defined(__AVX512BF16__)
template <>
struct MathOf<bf16> {
  using type = Bf16Pair;
};
#endif
template <class T>
using Math = typename MathOf<T>::type;

// Units that hold n elements.
template <class M>
constexpr int64_t units(int64_t n) {
  return (n + M::kElements - 1) / M::kElements;
}

// acc += A * B for every `step`th of K.
template <class M>
MK_INLINE void multiply(int64_t K, int64_t step, const typename M::Unit* a, int64_t row_stride,
                        int64_t col_stride, const typename M::Unit* b,
                        Vec<typename M::A> (&acc)[kTileRows][2]) {
  using A = typename M::A;
  constexpr int W = kLanes<A>;
  for (int64_t k = 0; k < K; k += step) {
    const Vec<A> b0 = load(b + k * 2 * W);
    const Vec<A> b1 = load(b + k * 2 * W + W);
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
      const typename M::Unit x = a[i * row_stride + k * col_stride];
      acc[i][0] = M::fma(x, b0, acc[i][0]);
      acc[i][1] = M::fma(x, b1, acc[i][1]);
    }
  }
}

template <class M>
MK_INLINE void tile(int64_t K, const typename M::Unit* a, int64_t row_stride, int64_t col_stride,
                    const typename M::Unit* b, typename M::A* c, int64_t ldc, bool accumulate) {
  using A = typename M::A;
  constexpr int W = kLanes<A>;
  Vec<A> acc[kTileRows][2];
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i) {
    acc[i][0] = accumulate ? load(c + i * ldc) : Vec<A>{};
    acc[i][1] = accumulate ? load(c + i * ldc + W) : Vec<A>{};
  }
  multiply<M>(K, 1, a, row_stride, col_stride, b, acc);
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i) {
    store(c + i * ldc, acc[i][0]);
    store(c + i * ldc + W, acc[i][1]);
  }
}

template <class M>
void matmul(int64_t rows, int64_t cols, int64_t K, const typename M::Unit* a, int64_t row_stride,
            int64_t col_stride, const typename M::Unit* b, typename M::A* c, int64_t ldc,
            bool accumulate) {
  constexpr int P = kPanel<typename M::A>;
  for (int64_t n = 0; n < cols; n += P, b += K * P) {
    for (int64_t m = 0; m < rows; m += kTileRows) {
      tile<M>(K, a + m * row_stride, row_stride, col_stride, b, c + m * ldc + n, ldc, accumulate);
    }
  }
}

// A tile whose elements have the bits of dot products over vectors of W units, as sum_each() ends
// them: lane l sums every W-th product from the l-th, then lanes are added by halves.
template <class M>
MK_INLINE void dot_tile(int64_t K, const typename M::Unit* a, int64_t row_stride,
                        const typename M::Unit* b, typename M::A* c, int64_t ldc) {
  using A = typename M::A;
  constexpr int W = kLanes<A>;
  // Lanes come in an order in which every sum's two halves are ready one after the other; a half
  // waits in pending[level] for the other.
  Vec<A> pending[kLaneBits<A>][kTileRows][2];
  for (int n = 0; n < W; ++n) {
    int lane = 0;
    for (int bit = 0; bit < kLaneBits<A>; ++bit) lane |= (n >> bit & 1) << (kLaneBits<A> - 1 - bit);
    Vec<A> acc[kTileRows][2] = {};
    multiply<M>(K - lane, W, a + lane, row_stride, 1, b + lane * 2 * W, acc);
    int level = 0;
    for (; n >> level & 1; ++level) {
#pragma GCC unroll 8
      for (int i = 0; i < kTileRows; ++i) {
        acc[i][0] += pending[level][i][0];
        acc[i][1] += pending[level][i][1];
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
      store(n + 1 < W ? reinterpret_cast<A*>(&pending[level][i][0]) : c + i * ldc, acc[i][0]);
      store(n + 1 < W ? reinterpret_cast<A*>(&pending[level][i][1]) : c + i * ldc + W, acc[i][1]);
    }
  }
}

// matmul() with dot_tile(); A is row-major.
template <class M>
void dot_products(int64_t rows, int64_t cols, int64_t K, const typename M::Unit* a,
                  int64_t row_stride, const typename M::Unit* b, typename M::A* c, int64_t ldc) {
  constexpr int P = kPanel<typename M::A>;
  for (int64_t n = 0; n < cols; n += P, b += K * P) {
    for (int64_t m = 0; m < rows; m += kTileRows) {
      dot_tile<M>(K, a + m * row_stride, row_stride, b, c + m * ldc + n, ldc);
    }
  }
}

// ---- packing -----------------------------------------------------------------------------------
// Rows come as pointers (null: a row of zeros); `dim` elements each, padded with zeros to kPair.

template <class T>
MK_INLINE void load_chunk(const T* row, int64_t d, int64_t dim, Vec<Acc<T>>& a, Vec<Acc<T>>& b) {
  if (row == nullptr) {
    a = b = Vec<Acc<T>>{};
  } else if (d + kPair<T> <= dim) {
    load_pair(row + d, a, b);
  } else {
    load_pair_tail(row + d, dim - d, a, b);
  }
}

#if defined(__AVX512BF16__)
// kPair bfloat16 elements as they lie, i.e. one vector of units.
MK_INLINE VecU32 load_words(const bf16* row, int64_t d, int64_t dim) {
  VecU32 words{};
  if (row == nullptr) return words;
  if (d + kPair<bf16> <= dim) {
    memcpy(&words, row + d, sizeof(words));
  } else {
    memcpy(&words, row + d, (dim - d) * sizeof(bf16));
  }
  return words;
}
#endif

// As A: [rows][units(padded dim)], returned stride.
template <class T>
MK_INLINE int64_t pack_a(const T* const* rows, int64_t num_rows, int64_t dim,
                         typename Math<T>::Unit* out) {
  using M = Math<T>;
  constexpr int W = kLanes<Acc<T>>;
  const int64_t stride = round_up(dim, kPair<T>) / M::kElements;
  for (int64_t r = 0; r < num_rows; ++r) {
    for (int64_t d = 0; d < dim; d += kPair<T>) {
      auto* to = out + r * stride + d / M::kElements;
      if constexpr (M::kElements == 1) {
        Vec<Acc<T>> x, y;
        load_chunk(rows[r], d, dim, x, y);
        store(to, x);
        store(to + W, y);
      } else {
#if defined(__AVX512BF16__)
        store(to, bit_cast<Vec<float>>(load_words(rows[r], d, dim)));
#endif
      }
    }
  }
  return stride;
}

// As B with the rows as columns: B[k, n] = rows[n][k], for scores Q K^T. num_rows is a multiple
// of kPanel; K = units(padded dim).
template <class T>
MK_INLINE void pack_b_transposed(const T* const* rows, int64_t num_rows, int64_t dim,
                                 typename Math<T>::Unit* out) {
  using M = Math<T>;
  using A = Acc<T>;
  constexpr int W = kLanes<A>;
  constexpr int P = kPanel<A>;
  const int64_t K = round_up(dim, kPair<T>) / M::kElements;
  for (int64_t n = 0; n < num_rows; n += W) {
    auto* panel = out + n / P * K * P + n % P;
    for (int64_t d = 0; d < dim; d += kPair<T>) {
      Vec<A> x[W], y[W];
      if constexpr (M::kElements == 1) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) load_chunk(rows[n + i], d, dim, x[i], y[i]);
        transpose<A>(x);
        transpose<A>(y);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) {
          store(panel + (d + i) * P, x[i]);
          store(panel + (d + W + i) * P, y[i]);
        }
      } else {
#if defined(__AVX512BF16__)
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) x[i] = bit_cast<Vec<A>>(load_words(rows[n + i], d, dim));
        transpose<A>(x);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) store(panel + (d / 2 + i) * P, x[i]);
#endif
      }
    }
  }
}

// As B with the rows as rows: B[k, n] = rows[k][n], columns in pair order, for P V. num_rows is
// even; K = units(num_rows).
template <class T, class M = Math<T>>
MK_INLINE void pack_b(const T* const* rows, int64_t num_rows, int64_t dim, typename M::Unit* out) {
  using A = Acc<T>;
  constexpr int W = kLanes<A>;
  constexpr int P = kPanel<A>;
  const int64_t K = units<M>(num_rows);
  for (int64_t r = 0; r < num_rows; r += M::kElements) {
    for (int64_t d = 0; d < dim; d += P) {
      auto* to = out + d * K + r / M::kElements * P;
      if constexpr (M::kElements == 1) {
        Vec<A> x, y;
        load_chunk(rows[r], d, dim, x, y);
        store(to, x);
        store(to + W, y);
      } else {
#if defined(__AVX512BF16__)
        const VecU32 x = load_words(rows[r], d, dim);
        const VecU32 y = load_words(rows[r + 1], d, dim);
        store(to, bit_cast<Vec<A>>((x & 0xffffu) | (y << 16)));
        store(to + W, bit_cast<Vec<A>>((x >> 16) | (y & 0xffff0000u)));
#endif
      }
    }
  }
}

// [rows][cols] to [cols][rows]; both are multiples of the vector's lanes.
template <class A>
MK_INLINE void transpose_matrix(const A* from, int64_t rows, int64_t cols, A* to) {
  constexpr int W = kLanes<A>;
  for (int64_t r = 0; r < rows; r += W) {
    for (int64_t c = 0; c < cols; c += W) {
      Vec<A> x[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) x[i] = load(from + (r + i) * cols + c);
      transpose<A>(x);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) store(to + (c + i) * rows + r, x[i]);
    }
  }
}

// An accumulator matrix [rows][cols] as A of the next product, k along its columns. F32 and F64
// use it where it lies; Bf16Pair rounds it into `out`. Returns the operand; its row stride is
// units(cols). cols is a multiple of kPanel.
template <class M>
MK_INLINE const typename M::Unit* as_a(const typename M::A* c, [[maybe_unused]] int64_t rows,
                                       [[maybe_unused]] int64_t cols, typename M::Unit* out) {
  if constexpr (M::kElements == 1) {
    return c;
  } else {
#if defined(__AVX512BF16__)
    constexpr int W = kLanes<float>;
    for (int64_t i = 0; i < rows * cols; i += 2 * W) {
      const __m512 lo = bit_cast<__m512>(load(c + i)), hi = bit_cast<__m512>(load(c + i + W));
      store(out + i / 2, bit_cast<Vec<float>>(_mm512_cvtne2ps_pbh(hi, lo)));
    }
#endif
    return out;
  }
}

// The same with k along its rows (the transpose): element (i, k) at out[k * cols + i].
template <class M>
MK_INLINE const typename M::Unit* as_a_transposed(const typename M::A* c,
                                                  [[maybe_unused]] int64_t rows,
                                                  [[maybe_unused]] int64_t cols,
                                                  typename M::Unit* out) {
  if constexpr (M::kElements == 1) {
    return c;
  } else {
#if defined(__AVX512BF16__)
    constexpr int W = kLanes<float>;
    for (int64_t r = 0; r < rows; r += 2) {
      for (int64_t i = 0; i < cols; i += W) {
        const VecU32 x = bf16_round(load(c + r * cols + i));
        const VecU32 y = bf16_round(load(c + (r + 1) * cols + i));
        store(out + r / 2 * cols + i, bit_cast<Vec<float>>((x >> 16) | (y & 0xffff0000u)));
      }
    }
#endif
    return out;
  }
}

}  // namespace
}  // namespace memkernels
