// lse = log sum_n e^lse_n, out = sum_n e^(lse_n - lse) out_n: one read of outs, one write of out.
//
// Backward, with w_n = e^(lse_n - lse): d out_n = w_n dout,
// d lse_n = w_n (dout . (out_n - out) + dlse).
#include "attention/merge_states.h"
#include "core/cpu/simd.h"

namespace memkernels::attention {
namespace {

template <class T>
struct Merge {
  using A = Acc<T>;
  static constexpr int W = kLanes<A>;

  static const T* part(const MergeStatesArgs& a, int64_t n, int64_t row) {
    const int64_t heads = a.outs.shape[2];
    return static_cast<const T*>(a.outs.data) + n * a.outs.stride[0] +
           row / heads * a.outs.stride[1] + row % heads * a.outs.stride[2];
  }

  static A part_lse(const MergeStatesArgs& a, int64_t n, int64_t row) {
    const int64_t heads = a.lses.shape[2];
    return static_cast<const A*>(
        a.lses.data)[n * a.lses.stride[0] + row / heads * a.lses.stride[1] +
                     row % heads * a.lses.stride[2]];
  }

  static void load_part(const T* row, int64_t d, int64_t dim, Vec<A>& x, Vec<A>& y) {
    if (d + kPair<T> <= dim) {
      load_pair(row + d, x, y);
    } else {
      load_pair_tail(row + d, dim - d, x, y);
    }
  }

  static void store_part(T* row, int64_t d, int64_t dim, Vec<A> x, Vec<A> y) {
    if (d + kPair<T> <= dim) {
      store_pair(row + d, x, y);
    } else {
      store_pair_tail(row + d, dim - d, x, y);
    }
  }

  // w_n = e^(lse_n - max) / total, which stays exact where lse itself is large. total is 0 if every
  // part is empty.
  struct Weights {
    A max = -kInfinity<A>, total = 0;

    Weights(const MergeStatesArgs& a, int64_t row) {
      const int64_t parts = a.outs.shape[0];
      for (int64_t n = 0; n < parts; ++n) {
        const A lse = part_lse(a, n, row);
        max = lse > max ? lse : max;
      }
      for (int64_t n = 0; n < parts; ++n) {
        const A lse = part_lse(a, n, row);
        if (lse != -kInfinity<A>) total += exp(lse - max);
      }
    }
    A of(A lse) const { return exp(lse - max) / total; }
  };

  static void forward(const MergeStatesArgs& a, int64_t row) {
    const int64_t parts = a.outs.shape[0], dim = a.outs.shape[3];
    const Weights weights(a, row);
    static_cast<A*>(a.lse.data)[row] =
        weights.total == 0 ? -kInfinity<A> : weights.max + log(weights.total);
    T* out = static_cast<T*>(a.out.data) + row * dim;
    constexpr int kChunks = 8;  // pairs at a time, so that a weight serves many elements
    for (int64_t d0 = 0; d0 < dim; d0 += kChunks * kPair<T>) {
      const int64_t left = (dim - d0 + kPair<T> - 1) / kPair<T>;
      const int chunks = static_cast<int>(left < kChunks ? left : kChunks);
      Vec<A> sums[kChunks][2] = {};
      for (int64_t n = 0; n < parts; ++n) {
        const A lse = part_lse(a, n, row);
        if (lse == -kInfinity<A>) continue;
        const A weight = weights.of(lse);
        const T* values = part(a, n, row);
        for (int c = 0; c < chunks; ++c) {
          Vec<A> x, y;
          load_part(values, d0 + c * kPair<T>, dim, x, y);
          sums[c][0] += x * weight;
          sums[c][1] += y * weight;
        }
      }
      for (int c = 0; c < chunks; ++c) {
        store_part(out, d0 + c * kPair<T>, dim, sums[c][0], sums[c][1]);
      }
    }
  }

  static void backward(const MergeStatesArgs& a, const MergeStatesGrads& g, int64_t row) {
    const int64_t parts = a.outs.shape[0], dim = a.outs.shape[3];
    const int64_t rows = a.outs.shape[1] * a.outs.shape[2];
    const T* out = static_cast<const T*>(a.out.data) + row * dim;
    const T* dout = static_cast<const T*>(g.dout.data) + row * dim;
    const Weights weights(a, row);
    const A dlse = g.dlse.ndim < 0 ? A(0) : static_cast<const A*>(g.dlse.data)[row];
    for (int64_t n = 0; n < parts; ++n) {
      T* douts = static_cast<T*>(g.douts.data) + (n * rows + row) * dim;
      A& dlses = static_cast<A*>(g.dlses.data)[n * rows + row];
      const A one = part_lse(a, n, row);
      if (one == -kInfinity<A>) {
        memset(static_cast<void*>(douts), 0, dim * sizeof(T));
        dlses = 0;
        continue;
      }
      const A weight = weights.of(one);
      const T* values = part(a, n, row);
      Vec<A> dot{};
      for (int64_t d = 0; d < dim; d += kPair<T>) {
        Vec<A> x, y, u, v, s, t;
        load_part(dout, d, dim, x, y);
        load_part(values, d, dim, u, v);
        load_part(out, d, dim, s, t);
        dot += x * (u - s) + y * (v - t);
        store_part(douts, d, dim, x * weight, y * weight);
      }
      dlses = weight * (sum<A>(dot) + dlse);
    }
  }
};

template <class T>
constexpr MergeKernel kernel_for() {
  return {Merge<T>::forward, Merge<T>::backward};
}

}  // namespace

namespace cpu::MEMKERNELS_ISA {

MergeKernel merge_kernel(Dtype dtype) {
  switch (dtype) {
    case Dtype::bf16:
      return kernel_for<bf16>();
    case Dtype::f16:
      return kernel_for<f16>();
#if defined(MEMKERNELS_BASELINE)
    case Dtype::f64:
      return kernel_for<double>();
#endif
    default:
      return kernel_for<float>();
  }
}

}  // namespace cpu::MEMKERNELS_ISA
}  // namespace memkernels::attention
