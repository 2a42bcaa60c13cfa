// d = p r_h r_k / sqrt(D), with p = sum(h k w) and r = 1 / sqrt(mean(x^2) + eps) of h and k;
// out = g v, g = sigmoid(sign(d) sqrt(max(|d|, 1e-6))). h and k are read and out is written once, 6
// bytes an element in bfloat16; v is read once for all channels.
//
// Backward, from the same sums: dg = dout . v; dd = dg g (1 - g) / (2 sqrt(|d|)), or 0 where
// |d| < 1e-6. With a = dd r_h r_k / sqrt(D): dh = a (k w - h p r_h^2 / D), dk alike, dw = a h k
// summed over tokens, dv = g dout summed over channels. h, k and dout are read from memory and dh
// and dk written once, 10 bytes an element.
//
// The next row is asked for while one is written, or reading would wait for arithmetic in turn.
#include "lookup/engram_gate.h"

#include "core/cpu/columns.h"

namespace memkernels::lookup {
namespace {

template <class T, class Weight>
struct Gate {
  using A = Acc<T>;

  // Row r of the T * C rows.
  static const T* row(const TensorView& x, int64_t r) {
    const int64_t channels = x.shape[1];
    return static_cast<const T*>(x.data) + r / channels * x.stride[0] + r % channels * x.stride[1];
  }
  static const T* token_row(const TensorView& x, int64_t t) {
    return static_cast<const T*>(x.data) + t * x.stride[0];
  }
  static const Weight* weight_row(const EngramGateArgs& a, int64_t c) {
    return static_cast<const Weight*>(a.weight.data) + c * a.weight.stride[0];
  }

  // What the gate of one token and channel comes from, and its derivatives need.
  struct Opening {
    A dot, rms_h, rms_k, scale;  // the factors of d; rms inverted
    A root;                      // of |d|, at least 1e-6
    bool clamped;
    A gate, slope;  // g, g (1 - g)

    Opening(const EngramGateArgs& a, const T* h, const T* k, const Weight* w) {
      const int64_t dim = a.hidden.shape[2];
      A sums[3];
      const auto add = [&](int64_t i, auto vector, Vec<A>* s) __attribute__((always_inline)) {
        const Vec<A> x = vector.load(h + i), y = vector.load(k + i);
        s[0] += x * x;
        s[1] += y * y;
        s[2] += x * y * vector.load(w + i);
      };
      sum_columns<A, 3>(dim, sums, add);
      rms_h = inverse_rms(sums[0], dim, a.eps);
      rms_k = inverse_rms(sums[1], dim, a.eps);
      dot = sums[2];
      scale = static_cast<A>(1 / __builtin_sqrt(static_cast<double>(dim)));
      const A d = dot * rms_h * rms_k * scale;
      const A size = d < 0 ? -d : d, least = static_cast<A>(1e-6);
      clamped = size < least;
      root = static_cast<A>(__builtin_sqrt(clamped ? least : size));
      const A e = exp(-root);
      slope = e / ((1 + e) * (1 + e));
      gate = (__builtin_signbit(d) ? e : A(1)) / (1 + e);
      if (d == 0 && a.sign == ZeroSign::zero) gate = A(0.5);
    }

    static A inverse_rms(A squares, int64_t dim, double eps) {
      const A mean = squares / static_cast<A>(dim) + static_cast<A>(eps);
      return A(1) / static_cast<A>(__builtin_sqrt(mean));
    }
  };

  static void forward(const EngramGateArgs& a, int64_t begin, int64_t end) {
    const int64_t channels = a.hidden.shape[1], dim = a.hidden.shape[2];
    T* out = static_cast<T*>(a.out.data) + begin * channels * dim;
    for (int64_t r = begin * channels; r < end * channels; ++r, out += dim) {
      const Opening opening(a, row(a.hidden, r), row(a.k, r), weight_row(a, r % channels));
      const T* v = token_row(a.v, r / channels);
      const int64_t next = r + 1 < end * channels ? r + 1 : r;
      const T *next_h = row(a.hidden, next), *next_k = row(a.k, next);
      for_columns<A>(dim, [&](int64_t i, auto vector, int) __attribute__((always_inline)) {
        prefetch_line(next_h + i);
        prefetch_line(next_k + i);
        vector.store(out + i, vector.load(v + i) * opening.gate);
      });
    }
  }

  static void backward(const EngramGateArgs& a, const EngramGateGrads& g, int64_t begin,
                       int64_t end, void* part, void* scratch) {
    const int64_t channels = a.hidden.shape[1], dim = a.hidden.shape[2];
    A* dweight = static_cast<A*>(part);
    A* dv = static_cast<A*>(scratch);
    const bool for_hidden = g.dhidden.data != nullptr, for_k = g.dk.data != nullptr;
    const bool for_weight = g.dweight.data != nullptr;
    T* dhidden = for_hidden ? static_cast<T*>(g.dhidden.data) + begin * channels * dim : nullptr;
    T* dk = for_k ? static_cast<T*>(g.dk.data) + begin * channels * dim : nullptr;
    memset(dweight, 0, channels * dim * sizeof(A));
    for (int64_t t = begin; t < end; ++t) {
      const T* v = token_row(a.v, t);
      memset(dv, 0, dim * sizeof(A));
      for (int64_t c = 0; c < channels; ++c, dhidden += dim, dk += dim) {
        const int64_t r = t * channels + c, next = r + 1 < end * channels ? r + 1 : r;
        const T *h = row(a.hidden, r), *k = row(a.k, r), *dout = row(g.dout, r);
        const T *next_h = row(a.hidden, next), *next_k = row(a.k, next);
        const T* next_dout = row(g.dout, next);
        const Weight* w = weight_row(a, c);
        const Opening o(a, h, k, w);
        A dgate;
        const auto add = [&](int64_t i, auto vector, Vec<A>* s) __attribute__((always_inline)) {
          const Vec<A> grad = vector.load(dout + i);
          s[0] += grad * vector.load(v + i);
          vector.store(dv + i, vector.load(dv + i) + grad * o.gate);
        };
        sum_columns<A, 1>(dim, &dgate, add);
        const A dd = o.clamped ? A(0) : dgate * o.slope / (2 * o.root);
        const A factor = dd * o.rms_h * o.rms_k * o.scale;
        const A along_h = o.dot * o.rms_h * o.rms_h / static_cast<A>(dim);
        const A along_k = o.dot * o.rms_k * o.rms_k / static_cast<A>(dim);
        A* dw = dweight + c * dim;
        for_columns<A>(dim, [&](int64_t i, auto vector, int) __attribute__((always_inline)) {
          prefetch_line(next_h + i);
          prefetch_line(next_k + i);
          prefetch_line(next_dout + i);
          const Vec<A> x = vector.load(h + i), y = vector.load(k + i), z = vector.load(w + i);
          if (for_hidden) vector.store(dhidden + i, factor * (y * z - x * along_h));
          if (for_k) vector.store(dk + i, factor * (x * z - y * along_k));
          if (for_weight) vector.store(dw + i, vector.load(dw + i) + factor * (x * y));
        });
      }
      if (g.dv.data == nullptr) continue;
      T* dv_row = static_cast<T*>(g.dv.data) + t * dim;
      for_columns<A>(dim, [&](int64_t i, auto vector, int) __attribute__((always_inline)) {
        vector.store(dv_row + i, vector.load(dv + i));
      });
    }
  }

  static void add_parts(const EngramGateGrads& g, const void* parts, int64_t num_parts,
                        int64_t begin, int64_t end) {
    const int64_t weights = g.dweight.shape[0] * g.dweight.shape[1];
    const A* from = static_cast<const A*>(parts) + begin;
    Weight* to = static_cast<Weight*>(g.dweight.data) + begin;
    for_columns<A>(end - begin, [&](int64_t i, auto vector, int) __attribute__((always_inline)) {
      Vec<A> sum{};
      for (int64_t p = 0; p < num_parts; ++p) sum += vector.load(from + p * weights + i);
      vector.store(to + i, sum);
    });
  }
};

template <class T, class Weight = T>
constexpr EngramGateKernel kernel_for() {
  using G = Gate<T, Weight>;
  return {G::forward, G::backward, G::add_parts};
}

}  // namespace

namespace cpu::MEMKERNELS_ISA {

EngramGateKernel engram_gate_kernel(Dtype dtype, bool wide_weight) {
  switch (dtype) {
    case Dtype::bf16:
      return wide_weight ? kernel_for<bf16, float>() : kernel_for<bf16>();
    case Dtype::f16:
      return wide_weight ? kernel_for<f16, float>() : kernel_for<f16>();
#if defined(MEMKERNELS_BASELINE)
    case Dtype::f64:
      return kernel_for<double>();
#endif
    default:
      return kernel_for<float>();
  }
}

}  // namespace cpu::MEMKERNELS_ISA
}  // namespace memkernels::lookup
