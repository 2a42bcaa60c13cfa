// y = sum_j w_j act(h_j) down_j with h_j = x . up_j, over the neurons j of a token. Backward, with
// s_j = dy . down_j: dw_j = act(h_j) s_j, dx = sum_j w_j act'(h_j) s_j up_j; the gradients of up_j
// and down_j are x and dy times w_j act'(h_j) s_j and w_j act(h_j), added up elsewhere.
//
// Cost: 2 (backward 3) multiply-adds for every element of the 2 K rows of a token, each read once
// from memory: in the backward a token's rows of up are still in cache when they are read again.
#include "lookup/sparse_ffn.h"

#include "core/cpu/arena.h"
#include "lookup/rows_cpu.h"

namespace memkernels::lookup {
namespace {

MK_INLINE float erfc(float x) { return __builtin_erfcf(x); }
MK_INLINE double erfc(double x) { return __builtin_erfc(x); }
MK_INLINE float tanh(float x) { return __builtin_tanhf(x); }
MK_INLINE double tanh(double x) { return __builtin_tanh(x); }
MK_INLINE float exp_of(float x) { return __builtin_expf(x); }
MK_INLINE double exp_of(double x) { return __builtin_exp(x); }

template <class A>
struct Activated {
  A value, slope;
};

template <class A>
Activated<A> activate(Activation activation, A h) {
  switch (activation) {
    case Activation::gelu: {
      const A below = A(0.5) * erfc(h * A(-0.70710678118654752440));
      const A density = A(0.39894228040143267794) * exp_of(A(-0.5) * h * h);
      return {h * below, below + h * density};
    }
    case Activation::gelu_tanh: {
      constexpr A kRoot = A(0.79788456080286535588), kCubic = A(0.044715);
      const A t = tanh(kRoot * (h + kCubic * h * h * h));
      const A slope = (1 - t * t) * kRoot * (1 + 3 * kCubic * h * h);
      return {A(0.5) * h * (1 + t), A(0.5) * (1 + t + h * slope)};
    }
    case Activation::silu: {
      const A s = 1 / (1 + exp_of(-h));
      return {h * s, s * (1 + h * (1 - s))};
    }
    case Activation::relu:
      return {h < 0 ? A(0) : h, A(h > 0)};
    case Activation::none:
      return {h, A(1)};
  }
  return {};
}

template <class T>
struct SparseFfn {
  using A = Acc<T>;

  struct Scratch {
    A *x, *y;              // rows, padded
    A *hidden, *received;  // [K]
    size_t bytes;
    Scratch(const SparseFfnArgs& args, void* base) {
      Arena arena{static_cast<char*>(base)};
      x = arena.take<A>(round_up(args.x.shape[1], kLanes<A>));
      y = arena.take<A>(round_up(args.down.shape[1], kLanes<A>));
      hidden = arena.take<A>(args.indices.shape[1]);
      received = arena.take<A>(args.indices.shape[1]);
      bytes = arena.used;
    }
  };

  static size_t scratch_bytes(const SparseFfnArgs& args) { return Scratch(args, nullptr).bytes; }

  static void write_sum(const Lists& lists, int64_t list, const Table<T>& table, const A* factors,
                        T* out) {
    sum_list(lists, list, table, factors,
             [&](int64_t c, int64_t left, Vec<A> sums)
                 __attribute__((always_inline)) { store_some(out + c, left, sums); });
  }

  static void forward(const SparseFfnArgs& args, const Lists& lists, int64_t begin, int64_t end,
                      void* scratch) {
    const Scratch s(args, scratch);
    const Table<T> up(args.up, 0, args.up.shape[1]), down(args.down, 0, args.down.shape[1]);
    const A* const weights = static_cast<const A*>(lists.factors);
    T* out = static_cast<T*>(args.out.data);
    for (int64_t t = begin; t < end; ++t) {
      A* const hidden = s.hidden - lists.starts[t];
      read_row<T>(args.x, t, s.x);
      multiply_list(lists, t, up, s.x, hidden);
      for (int64_t i = lists.starts[t]; i < lists.starts[t + 1]; ++i) {
        hidden[i] = weights[i] * activate(args.activation, hidden[i]).value;
      }
      write_sum(lists, t, down, hidden, out + t * down.columns);
    }
  }

  static void backward(const SparseFfnArgs& args, const SparseFfnGrads& grads, const Lists& lists,
                       int64_t begin, int64_t end, void* scratch) {
    const Scratch s(args, scratch);
    const Table<T> up(args.up, 0, args.up.shape[1]), down(args.down, 0, args.down.shape[1]);
    const A* const weights = static_cast<const A*>(lists.factors);
    A* const dweights = static_cast<A*>(grads.dweights.data);
    A* const up_factors = static_cast<A*>(grads.up_factors.data);
    A* const down_factors = static_cast<A*>(grads.down_factors.data);
    T* dx = static_cast<T*>(grads.dx.data);
    for (int64_t t = begin; t < end; ++t) {
      A* const hidden = s.hidden - lists.starts[t];
      A* const received = s.received - lists.starts[t];
      read_row<T>(grads.dy, t, s.y);
      multiply_list(lists, t, down, s.y, received);
      read_row<T>(args.x, t, s.x);
      multiply_list(lists, t, up, s.x, hidden);
      for (int64_t i = lists.starts[t]; i < lists.starts[t + 1]; ++i) {
        const Activated<A> act = activate(args.activation, hidden[i]);
        const A weight = lists.rows[i] < 0 ? A(0) : weights[i];
        dweights[i] = act.value * received[i];
        up_factors[i] = weight * act.slope * received[i];
        down_factors[i] = weight * act.value;
      }
      if (dx != nullptr) write_sum(lists, t, up, up_factors, dx + t * up.columns);
    }
  }
};

template <class T>
constexpr SparseFfnKernel kernel_for() {
  return {SparseFfn<T>::scratch_bytes, SparseFfn<T>::forward, SparseFfn<T>::backward};
}

}  // namespace

namespace cpu::MEMKERNELS_ISA {

SparseFfnKernel sparse_ffn_kernel(Dtype dtype) {
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
}  // namespace memkernels::lookup
