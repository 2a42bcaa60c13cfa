// Linear attention: S = e^g S + k v^T, o = scale S^T q; with z = e^g z + k, o is divided by
// scale z . q + eps. The delta rule: u = beta (v - (e^g S)^T k), S = e^g S + k u^T, and o = scale
// ((e^g S)^T q + (k . q) u), so that one reading of S gives both products and a second one, out of
// cache, changes it.
//
// Cost: S is read from memory and written back once, 8 bytes an element in float32. Some columns at
// a time are gone down, so that their sums stay in registers; meanwhile the next head's state is
// asked for, line after line.
#include "scan/state_step.h"

#include "core/cpu/arena.h"
#include "scan/rows_cpu.h"

namespace memkernels::scan {
namespace {

template <class T>
struct StateStep {
  using A = Acc<T>;
  static constexpr int W = kLanes<A>;

  // Rows padded with zeros to whole vectors.
  struct Scratch {
    A *q, *k, *decay;      // [K]
    A *q_decay, *k_decay;  // [K], their products
    A *u, *out, *recall;   // [V]: what k writes, S^T q, S^T k
    size_t bytes;
    Scratch(const StateStepArgs& a, void* base) {
      Arena arena{static_cast<char*>(base)};
      const int64_t keys = round_up(a.k.shape[2], W), values = round_up(a.v.shape[2], W);
      q = arena.take<A>(keys);
      k = arena.take<A>(keys);
      decay = arena.take<A>(keys);
      q_decay = arena.take<A>(keys);
      k_decay = arena.take<A>(keys);
      u = arena.take<A>(values);
      out = arena.take<A>(values);
      recall = arena.take<A>(values);
      bytes = arena.used;
    }
  };

  static size_t scratch_bytes(const StateStepArgs& a) { return Scratch(a, nullptr).bytes; }

  static void normalise(A* x, int64_t size) {
    const A factor = inverse_norm(x, size);
    for (int64_t i = 0; i < size; i += W) store(x + i, load(x + i) * factor);
  }

  // e^g of each key channel.
  static void read_decay(const TensorView& g, int64_t row, int64_t head, Dtype main, int64_t size,
                         A* decay) {
    if (g.ndim == 3) {
      if (g.dtype == main) {
        read_row(at<T>(g, row, head), size, decay);
      } else {
        read_row(at<A>(g, row, head), size, decay);
      }
      for (int64_t i = 0; i < size; i += W) store(decay + i, exp_or_inf(load(decay + i)));
    } else {
      const int64_t place =
          g.ndim == 1 ? head * g.stride[0] : row * g.stride[0] + head * g.stride[1];
      const A x =
          g.data == nullptr ? A(1) : exp(static_cast<A>(load_scalar(g.data, g.dtype, place)));
      for (int64_t i = 0; i < size; i += W) store(decay + i, splat(x));
    }
  }

  // body(vectors, column, vector) for groups of `Most` vectors of columns, then for smaller ones.
  template <int Most, class Body>
  static MK_INLINE void for_blocks(int64_t columns, const Body& body) {
    int64_t c = 0;
    const auto blocks = [&](auto vectors) __attribute__((always_inline)) {
      constexpr int kColumns = decltype(vectors)::value * W;
      for (; c + kColumns <= columns; c += kColumns) body(vectors, c, WholeVector{});
    };
    blocks(Int<Most>{});
    blocks(Int<Most / 2>{});
    blocks(Int<1>{});
    if (c < columns) body(Int<1>{}, c, PartOfVector{columns - c});
  }

  // Asks for the next elements, at least as many as are given.
  template <int N>
  static MK_INLINE void ask(const A*& ahead) {
    constexpr int kLine = 64 / static_cast<int>(sizeof(A));
    for (int i = 0; i < N; i += kLine) prefetch_line(ahead + i);
    ahead += N;
  }

  // out = S^T q and recall = S^T k, for C vectors of columns.
  template <int C, class Vector>
  static MK_INLINE void read_block(const A* s, int64_t pitch, int64_t keys, const A* q, const A* k,
                                   Vector vector, A* out, A* recall, const A*& ahead) {
    Vec<A> read[C] = {}, recalled[C] = {};
    for (int64_t i = 0; i < keys; ++i, s += pitch) {
      ask<C * W / 2>(ahead);
      const Vec<A> qs = splat(q[i]), ks = splat(k[i]);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        const Vec<A> x = vector.load(s + c * W);
        read[c] += qs * x;
        recalled[c] += ks * x;
      }
    }
    for (int c = 0; c < C; ++c) {
      store(out + c * W, read[c]);
      store(recall + c * W, recalled[c]);
    }
  }

  // S = decay S + k u^T, and if asked for, out = S^T q after it.
  template <int C, bool kReads, class Vector>
  static MK_INLINE void write_block(A* s, int64_t pitch, int64_t keys, const A* decay, const A* k,
                                    const A* u, const A* q, Vector vector, A* out,
                                    const A*& ahead) {
    Vec<A> written[C], read[C] = {};
    for (int c = 0; c < C; ++c) written[c] = load(u + c * W);
    for (int64_t i = 0; i < keys; ++i, s += pitch) {
      ask<kReads ? C * W : C * W / 2>(ahead);
      const Vec<A> decays = splat(decay[i]), ks = splat(k[i]);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        const Vec<A> x = decays * vector.load(s + c * W) + ks * written[c];
        vector.store(s + c * W, x);
        if (kReads) read[c] += splat(q[i]) * x;
      }
    }
    for (int c = 0; kReads && c < C; ++c) store(out + c * W, read[c]);
  }

  // Linear attention in `columns` columns of S, into s.out.
  static void linear(const Scratch& s, A* state, int64_t pitch, int64_t keys, int64_t columns,
                     const A* ahead) {
    for_blocks<8>(
        columns, [&](auto vectors, int64_t c, auto vector) __attribute__((always_inline)) {
          write_block<decltype(vectors)::value, true>(state + c, pitch, keys, s.decay, s.k, s.u + c,
                                                      s.q, vector, s.out + c, ahead);
        });
  }

  // The same of the delta rule.
  static void delta(const Scratch& s, A beta, A* state, int64_t pitch, int64_t keys,
                    int64_t columns, const A* ahead) {
    const A along = dot(s.q, s.k, keys);
    for (int64_t i = 0; i < keys; i += W) {
      store(s.q_decay + i, load(s.q + i) * load(s.decay + i));
      store(s.k_decay + i, load(s.k + i) * load(s.decay + i));
    }
    for_blocks<4>(
        columns, [&](auto vectors, int64_t c, auto vector) __attribute__((always_inline)) {
          constexpr int C = decltype(vectors)::value;
          A *const u = s.u + c, *const out = s.out + c, *const recall = s.recall + c;
          read_block<C>(state + c, pitch, keys, s.q_decay, s.k_decay, vector, out, recall, ahead);
          for (int i = 0; i < C * W; i += W) {
            const Vec<A> written = beta * (load(u + i) - load(recall + i));
            store(u + i, written);
            store(out + i, load(out + i) + along * written);
          }
          write_block<C, false>(state + c, pitch, keys, s.decay, s.k, u, s.q, vector, out, ahead);
        });
  }

  static void run(const StateStepArgs& a, const int64_t* slots, int64_t begin, int64_t end,
                  int64_t first, int64_t last, void* scratch) {
    const Scratch s(a, scratch);
    const int64_t heads = a.v.shape[1], keys = a.k.shape[2], values = a.v.shape[2];
    const int64_t group = heads / a.k.shape[1], columns = last - first;
    const auto state_of = [&](int64_t i) __attribute__((always_inline)) {
      const int64_t slot = slots[i / heads], head = i % heads;
      return at<A>(a.state, slot, head) + first;
    };
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / heads, head = i % heads, slot = slots[row];
      T* const out = static_cast<T*>(a.out.data) + i * values + first;
      if (slot < 0) {
        memset(out, 0, columns * sizeof(T));
        continue;
      }
      A* const state = state_of(i);
      const A* const next = i + 1 < end && slots[(i + 1) / heads] >= 0 ? state_of(i + 1) : state;
      const int64_t query_head = head / group;
      read_row(at<T>(a.q, row, query_head), keys, s.q);
      read_row(at<T>(a.k, row, query_head), keys, s.k);
      read_row(at<T>(a.v, row, head, first), columns, s.u);
      read_decay(a.g, row, head, a.q.dtype, keys, s.decay);
      if (a.qk_l2norm) {
        normalise(s.q, keys);
        normalise(s.k, keys);
      }
      A factor = static_cast<A>(a.scale);
      if (a.beta.data == nullptr) {
        linear(s, state, values, keys, columns, next);
      } else {
        const int64_t place = row * a.beta.stride[0] + head * a.beta.stride[1];
        const A beta = static_cast<A>(load_scalar(a.beta.data, a.beta.dtype, place));
        delta(s, beta, state, values, keys, columns, next);
      }
      if (a.z.data != nullptr) {
        A* const z = at<A>(a.z, slot, head);
        Vec<A> total{};
        for_columns<A>(keys, [&](int64_t c, auto vector, int) __attribute__((always_inline)) {
          const Vec<A> x = load(s.decay + c) * vector.load(z + c) + load(s.k + c);
          vector.store(z + c, x);
          total += x * load(s.q + c);
        });
        factor /= factor * sum<A>(total) + static_cast<A>(a.eps);
      }
      for_columns<A>(columns, [&](int64_t c, auto vector, int) __attribute__((always_inline)) {
        vector.store(out + c, factor * load(s.out + c));
      });
    }
  }
};

template <class T>
constexpr StateStepKernel kernel_for() {
  return {StateStep<T>::scratch_bytes, StateStep<T>::run};
}

}  // namespace

namespace cpu::MEMKERNELS_ISA {

StateStepKernel state_step_kernel(Dtype dtype) {
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
