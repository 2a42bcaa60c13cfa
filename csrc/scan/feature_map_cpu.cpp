// elu1: x + 1 or e^x; relu2: max(x, 0)^2. taylor2: 1, x_i / D^(1/4), and x_i x_j / sqrt(D) for
// i <= j, over sqrt(2) where i = j. dpfp: r_i r_(i - j) for j = 1 to nu, r = max([x, -x], 0),
// indices modulo 2 D.
//
// Cost: features are written, or their gradients read, once; up to two multiply-adds each.
#include "scan/feature_map.h"

#include "core/cpu/arena.h"
#include "core/cpu/columns.h"

namespace memkernels::scan {
namespace {

// The place of a row in a tensor [..., D].
MK_INLINE int64_t row_offset(const TensorView& t, int64_t row) {
  int64_t offset = 0;
  for (int i = t.ndim - 2; i >= 0; --i) {
    offset += row % t.shape[i] * t.stride[i];
    row /= t.shape[i];
  }
  return offset;
}

template <class A>
MK_INLINE Vec<A> positive(Vec<A> x) {
  return x < 0 ? Vec<A>{} : x;  // NaN stays
}

template <class T>
struct FeatureMap {
  using A = Acc<T>;
  static constexpr int W = kLanes<A>;

  struct Scratch {
    A* x;         // [2 D], with zeros behind
    A* gradient;  // [2 D]
    A* features;
    size_t bytes;
    Scratch(int64_t dim, int64_t num_features, void* base) {
      Arena arena{static_cast<char*>(base)};
      x = arena.take<A>(2 * dim + W);
      gradient = arena.take<A>(2 * dim + W);
      features = arena.take<A>(num_features + W);
      bytes = arena.used;
    }
  };

  static size_t scratch_bytes(int64_t dim, int64_t features) {
    return Scratch(dim, features, nullptr).bytes;
  }

  template <class From, class To>
  static MK_INLINE void convert(const From* from, int64_t size, To* to) {
    for_columns<A>(size, [&](int64_t i, auto vector, int) __attribute__((always_inline)) {
      vector.store(to + i, vector.load(from + i));
    });
  }

  // r = max([x, -x], 0).
  static MK_INLINE void rectify(const T* x, int64_t dim, A* r) {
    for_columns<A>(dim, [&](int64_t i, auto vector, int) __attribute__((always_inline)) {
      const Vec<A> v = vector.load(x + i);
      vector.store(r + i, positive<A>(v));
      vector.store(r + dim + i, positive<A>(-v));
    });
  }

  // body(i, k, size) for the stretches of i in which k = i - shift, modulo n, rises with it.
  template <class Body>
  static MK_INLINE void for_shifted(int64_t n, int64_t shift, const Body& body) {
    shift %= n;
    body(0, n - shift, shift);
    body(shift, 0, n - shift);
  }

  static void forward(const FeatureMapArgs& a, int64_t features, int64_t begin, int64_t end,
                      void* scratch) {
    const int64_t dim = a.x.shape[a.x.ndim - 1];
    const Scratch s(dim, features, scratch);
    T* out = static_cast<T*>(a.out.data) + begin * features;
    for (int64_t row = begin; row < end; ++row, out += features) {
      const T* x = static_cast<const T*>(a.x.data) + row_offset(a.x, row);
      switch (a.kind) {
        case FeatureKind::elu1:
          for_columns<A>(dim, [&](int64_t i, auto vector, int) __attribute__((always_inline)) {
            const Vec<A> v = vector.load(x + i);
            vector.store(out + i, v > 0 ? v + 1 : exp(v));
          });
          break;
        case FeatureKind::relu2:
          for_columns<A>(dim, [&](int64_t i, auto vector, int) __attribute__((always_inline)) {
            const Vec<A> v = positive<A>(vector.load(x + i));
            vector.store(out + i, v * v);
          });
          break;
        case FeatureKind::taylor2:
          taylor(x, dim, s);
          convert(s.features, features, out);
          break;
        case FeatureKind::dpfp:
          rectify(x, dim, s.x);
          for (int64_t j = 1; j <= a.nu; ++j) {
            T* const to = out + (j - 1) * 2 * dim;
            for_shifted(
                2 * dim, j, [&](int64_t i, int64_t k, int64_t size) __attribute__((always_inline)) {
                  for_columns<A>(size, [&](int64_t c, auto vector,
                                           int) __attribute__((always_inline)) {
                    vector.store(to + i + c, vector.load(s.x + i + c) * vector.load(s.x + k + c));
                  });
                });
          }
          break;
      }
    }
  }

  // Factors of x_i, of x_i x_j, and of x_i x_i on top of that.
  struct Factors {
    A first, second, diagonal;
    explicit Factors(int64_t dim) {
      const double root = __builtin_sqrt(static_cast<double>(dim));
      first = static_cast<A>(1 / __builtin_sqrt(root));
      second = static_cast<A>(1 / root);
      diagonal = static_cast<A>(__builtin_sqrt(0.5));
    }
  };

  // A vector may reach beyond its row of products: what follows is written later.
  static void taylor(const T* row, int64_t dim, const Scratch& s) {
    const Factors factors(dim);
    convert(row, dim, s.x);
    store(s.x + dim, Vec<A>{});
    A* to = s.features;
    *to++ = 1;
    for (int64_t i = 0; i < dim; i += W) store(to + i, load(s.x + i) * factors.first);
    to += dim;
    for (int64_t i = 0; i < dim; to += dim - i, ++i) {
      const Vec<A> x = splat(s.x[i] * factors.second);
      for (int64_t j = i; j < dim; j += W) store(to + j - i, load(s.x + j) * x);
      *to *= factors.diagonal;
    }
  }

  static void backward(const FeatureMapArgs& a, const FeatureMapGrads& g, int64_t features,
                       int64_t begin, int64_t end, void* scratch) {
    const int64_t dim = a.x.shape[a.x.ndim - 1];
    const Scratch s(dim, features, scratch);
    T* dx = static_cast<T*>(g.dx.data) + begin * dim;
    for (int64_t row = begin; row < end; ++row, dx += dim) {
      const T* x = static_cast<const T*>(a.x.data) + row_offset(a.x, row);
      const T* dout = static_cast<const T*>(g.dout.data) + row_offset(g.dout, row);
      switch (a.kind) {
        case FeatureKind::elu1:
          for_columns<A>(dim, [&](int64_t i, auto vector, int) __attribute__((always_inline)) {
            const Vec<A> v = vector.load(x + i), grad = vector.load(dout + i);
            vector.store(dx + i, v > 0 ? grad : grad * exp(v));
          });
          break;
        case FeatureKind::relu2:
          for_columns<A>(dim, [&](int64_t i, auto vector, int) __attribute__((always_inline)) {
            const Vec<A> v = positive<A>(vector.load(x + i));
            vector.store(dx + i, 2 * v * vector.load(dout + i));
          });
          break;
        case FeatureKind::taylor2:
          taylor_backward(x, dout, dim, features, s);
          convert(s.gradient, dim, dx);
          break;
        case FeatureKind::dpfp:
          rectify(x, dim, s.x);
          dpfp_backward(dout, dim, a.nu, s);
          for_columns<A>(dim, [&](int64_t i, auto vector, int) __attribute__((always_inline)) {
            const Vec<A> v = vector.load(x + i), up = vector.load(s.gradient + i);
            const Vec<A> down = vector.load(s.gradient + dim + i);
            vector.store(dx + i, (v <= 0 ? Vec<A>{} : up) - (v >= 0 ? Vec<A>{} : down));
          });
          break;
      }
    }
  }

  static void taylor_backward(const T* row, const T* dout, int64_t dim, int64_t features,
                              const Scratch& s) {
    const Factors factors(dim);
    convert(row, dim, s.x);
    convert(dout, features, s.features);
    const A* from = s.features + 1;
    for_columns<A>(dim, [&](int64_t i, auto vector, int) __attribute__((always_inline)) {
      vector.store(s.gradient + i, vector.load(from + i) * factors.first);
    });
    from += dim;
    for (int64_t i = 0; i < dim; from += dim - i, ++i) {
      s.features[from - s.features] *= factors.diagonal;
      const A x = s.x[i] * factors.second;
      A along;
      const auto add = [&](int64_t j, auto vector, Vec<A>* sum) __attribute__((always_inline)) {
        const Vec<A> grad = vector.load(from + j);
        sum[0] += grad * vector.load(s.x + i + j);
        vector.store(s.gradient + i + j, vector.load(s.gradient + i + j) + grad * x);
      };
      sum_columns<A, 1>(dim - i, &along, add);
      s.gradient[i] += along * factors.second;
    }
  }

  // The gradient of r.
  static void dpfp_backward(const T* dout, int64_t dim, int64_t nu, const Scratch& s) {
    memset(s.gradient, 0, 2 * dim * sizeof(A));
    for (int64_t j = 1; j <= nu; ++j, dout += 2 * dim) {
      for_shifted(
          2 * dim, j, [&](int64_t i, int64_t k, int64_t size) __attribute__((always_inline)) {
            const auto add = [&](int64_t to, int64_t other) __attribute__((always_inline)) {
              for_columns<A>(size, [&](int64_t c, auto vector, int) __attribute__((always_inline)) {
                const Vec<A> grad = vector.load(dout + i + c) * vector.load(s.x + other + c);
                vector.store(s.gradient + to + c, vector.load(s.gradient + to + c) + grad);
              });
            };
            add(i, k);
            add(k, i);
          });
    }
  }
};

template <class T>
constexpr FeatureMapKernel kernel_for() {
  using F = FeatureMap<T>;
  return {F::scratch_bytes, F::forward, F::backward};
}

}  // namespace

namespace cpu::MEMKERNELS_ISA {

FeatureMapKernel feature_map_kernel(Dtype dtype) {
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
}  // namespace memkernels::scan
