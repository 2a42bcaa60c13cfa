// One pass over each row that changes, its states and its gradient:
//   sgd      p -= lr (g + decay p)
//   adagrad  s += g^2 (or the mean of a row's), p -= lr g / (sqrt(s) + eps)
//   adam     m = b1 m + (1 - b1) g, s = b2 s + (1 - b2) g^2,
//            p = (1 - lr decay) p - lr / (1 - b1^step) m / (sqrt(s / (1 - b2^step)) + eps)
// An element in float32 moves 12, 20 and 28 bytes. Rows lie anywhere, so that they are asked for
// before they are needed.
#include "lookup/row_update.h"

#include "core/cpu/columns.h"

namespace memkernels::lookup {
namespace {

template <class A>
MK_INLINE Vec<A> sqrt(Vec<A> x) {
  for (int i = 0; i < kLanes<A>; ++i) x[i] = static_cast<A>(__builtin_sqrt(x[i]));
  return x;
}

// A rule has the types of the table and of its states of elements, how many of these there are, and
// what becomes of some elements.
template <class T>
struct Sgd {
  using Param = T;
  using A = Acc<T>;
  using First = A;
  using Second = A;
  static constexpr int kStates = 0;
  A lr, decay;

  explicit Sgd(const RowUpdateArgs& a)
      : lr(static_cast<A>(a.lr)), decay(static_cast<A>(a.weight_decay)) {}
  void begin_row(const RowUpdateArgs&, int64_t, const A*) {}
  MK_INLINE Vec<A> step(Vec<A> p, Vec<A> g, Vec<A>&, Vec<A>&) const {
    return p - lr * (g + decay * p);
  }
};

template <class T>
struct Adagrad {
  using Param = T;
  using A = Acc<T>;
  using First = A;
  using Second = A;
  static constexpr int kStates = 1;
  A lr, eps;

  explicit Adagrad(const RowUpdateArgs& a) : lr(static_cast<A>(a.lr)), eps(static_cast<A>(a.eps)) {}
  void begin_row(const RowUpdateArgs&, int64_t, const A*) {}
  MK_INLINE Vec<A> step(Vec<A> p, Vec<A> g, Vec<A>& sum, Vec<A>&) const {
    sum += g * g;
    return p - lr * g / (sqrt<A>(sum) + eps);
  }
};

// One accumulator a row.
template <class T>
struct RowwiseAdagrad : Adagrad<T> {
  using A = Acc<T>;
  using Adagrad<T>::Adagrad;
  static constexpr int kStates = 0;
  A root = 0;

  void begin_row(const RowUpdateArgs& a, int64_t row, const A* grad) {
    const int64_t dim = a.param.shape[1];
    A squares;
    const auto add = [&](int64_t i, auto vector, Vec<A>* s) __attribute__((always_inline)) {
      const Vec<A> g = vector.load(grad + i);
      s[0] += g * g;
    };
    sum_columns<A, 1>(dim, &squares, add);
    A& total = static_cast<A*>(a.first.data)[row * a.first.stride[0]];
    total += squares / static_cast<A>(dim);
    root = sqrt<A>(splat(total))[0] + this->eps;
  }
  MK_INLINE Vec<A> step(Vec<A> p, Vec<A> g, Vec<A>&, Vec<A>&) const {
    return p - this->lr * g / root;
  }
};

template <class T, class FirstT, class SecondT>
struct Adam {
  using Param = T;
  using A = Acc<T>;
  using First = FirstT;
  using Second = SecondT;
  static constexpr int kStates = 2;
  A keep_mean, take_mean, keep_square, take_square, keep, lr, correct_square, eps;

  explicit Adam(const RowUpdateArgs& a) {
    const double step = static_cast<double>(a.step);
    keep_mean = static_cast<A>(a.beta1);
    take_mean = static_cast<A>(1 - a.beta1);
    keep_square = static_cast<A>(a.beta2);
    take_square = static_cast<A>(1 - a.beta2);
    keep = static_cast<A>(1 - a.lr * a.weight_decay);
    lr = static_cast<A>(a.lr / (1 - __builtin_pow(a.beta1, step)));
    correct_square = static_cast<A>(1 / (1 - __builtin_pow(a.beta2, step)));
    eps = static_cast<A>(a.eps);
  }
  void begin_row(const RowUpdateArgs&, int64_t, const A*) {}
  MK_INLINE Vec<A> step(Vec<A> p, Vec<A> g, Vec<A>& mean, Vec<A>& square) const {
    mean = keep_mean * mean + take_mean * g;
    square = keep_square * square + take_square * (g * g);
    return keep * p - lr * mean / (sqrt<A>(square * correct_square) + eps);
  }
};

template <class X>
MK_INLINE X* row_of(const TensorView& t, int64_t row) {
  return static_cast<X*>(t.data) + row * t.stride[0];
}

template <class Rule>
void update(const RowUpdateArgs& a, const int64_t* rows, int64_t begin, int64_t end) {
  using T = typename Rule::Param;
  using A = Acc<T>;
  using First = typename Rule::First;
  using Second = typename Rule::Second;
  constexpr int64_t kAhead = 512;  // elements
  const int64_t dim = a.param.shape[1], ahead = 1 + kAhead / dim;
  Rule rule(a);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = rows[i];
    if (row < 0) continue;
    const int64_t next = i + ahead < end && rows[i + ahead] >= 0 ? rows[i + ahead] : row;
    const A* grad = row_of<const A>(a.grads, i);
    T *param = row_of<T>(a.param, row), *next_param = row_of<T>(a.param, next);
    First *first = row_of<First>(a.first, row), *next_first = row_of<First>(a.first, next);
    Second *second = row_of<Second>(a.second, row), *next_second = row_of<Second>(a.second, next);
    rule.begin_row(a, row, grad);
    for_columns<A>(dim, [&](int64_t d, auto vector, int chain) __attribute__((always_inline)) {
      if (chain == 0 || kVectorBytes == 64) {
        prefetch_line(next_param + d);
        if (Rule::kStates > 0) prefetch_line(next_first + d);
        if (Rule::kStates > 1) prefetch_line(next_second + d);
      }
      Vec<A> x{}, y{};
      if (Rule::kStates > 0) x = vector.load(first + d);
      if (Rule::kStates > 1) y = vector.load(second + d);
      vector.store(param + d, rule.step(vector.load(param + d), vector.load(grad + d), x, y));
      if (Rule::kStates > 0) vector.store(first + d, x);
      if (Rule::kStates > 1) vector.store(second + d, y);
    });
  }
}

template <class T>
RowUpdateKernel adam_for(const RowUpdateArgs& a) {
  using A = Acc<T>;
  const bool narrow = a.first.dtype == a.param.dtype;
  const bool narrow_square = a.second.dtype == a.param.dtype;
  return narrow ? (narrow_square ? update<Adam<T, T, T>> : update<Adam<T, T, A>>)
                : (narrow_square ? update<Adam<T, A, T>> : update<Adam<T, A, A>>);
}

template <class T>
RowUpdateKernel kernel_for(const RowUpdateArgs& a) {
  switch (a.optimiser) {
    case Optimiser::adam:
      return adam_for<T>(a);
    case Optimiser::adagrad:
      return a.first.ndim == 2 ? update<Adagrad<T>> : update<RowwiseAdagrad<T>>;
    default:
      return update<Sgd<T>>;
  }
}

}  // namespace

namespace cpu::MEMKERNELS_ISA {

RowUpdateKernel row_update_kernel(const RowUpdateArgs& args) {
  switch (args.param.dtype) {
    case Dtype::bf16:
      return kernel_for<bf16>(args);
    case Dtype::f16:
      return kernel_for<f16>(args);
#if defined(MEMKERNELS_BASELINE)
    case Dtype::f64:
      return kernel_for<double>(args);
#endif
    default:
      return kernel_for<float>(args);
  }
}

}  // namespace cpu::MEMKERNELS_ISA
}  // namespace memkernels::lookup
