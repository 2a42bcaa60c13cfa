// y[t] = bias + sum_i w_i x[t - (W - 1 - i)], out = y or silu(y), channel by channel, along rows
// that lie a dilation apart. x is read and out written once from memory, 8 bytes an element in
// float32; W multiply-adds an element.
//
// Backward, with p = dout or dout silu'(y), y computed again: dx[s] = sum_i w_i p[s + (W - 1 - i)],
// dw_i = sum_t p[t] x[t - (W - 1 - i)], dbias = sum_t p[t]. Inputs before the sequence are those of
// the initial state, and their gradients its gradient; a final state's gradient adds to that of the
// inputs it holds. p of a run, and of the W - 1 tokens after it, stays in cache until dx is made.
//
// Some tokens at a time go along the channels, so that an input serves all its outputs at once.
#include "scan/causal_conv1d.h"

#include "core/cpu/arena.h"
#include "lookup/columns_cpu.h"

namespace memkernels::scan {
namespace {

using lookup::for_columns;

constexpr int kTokens = 4;
constexpr int kMostTaps = 16;

template <class A>
MK_INLINE Vec<A> sigmoid(Vec<A> x) {
  const Vec<A> e = exp(x < 0 ? x : -x);
  return (x < 0 ? e : splat(A(1))) / (1 + e);
}

// body(taps) with their number as a type where loops over it are worth unrolling, else 0.
template <class Body>
MK_INLINE void for_taps(int64_t taps, const Body& body) {
  switch (taps) {
    case 2:
      return body(Int<2>{});
    case 3:
      return body(Int<3>{});
    case 4:
      return body(Int<4>{});
    default:
      return body(Int<0>{});
  }
}

// body(tokens, first of them) along [begin, end).
template <class Body>
MK_INLINE void for_tokens(int64_t begin, int64_t end, const Body& body) {
  for (; begin + kTokens <= end; begin += kTokens) body(Int<kTokens>{}, begin);
  for (; begin < end; ++begin) body(Int<1>{}, begin);
}

template <class T>
struct CausalConv {
  using A = Acc<T>;

  struct Scratch {
    int64_t pitch;
    A* zeros;   // [C]
    T* before;  // [kTokens + W - 1, C]: inputs before the sequence
    // The backward's:
    A* p;       // [kConvRun + W - 1, C]
    A* sums;    // [W + 1, C]: dweight and dbias of a run
    A* dstate;  // [kTokens, C]: what a final state's gradient adds
    A* row;     // [C]
    size_t bytes;
    Scratch(const CausalConvArgs& a, int64_t channels, void* base)
        : pitch(round_up(channels, kLanes<A>)) {
      const int64_t taps = a.weight.shape[1];
      Arena arena{static_cast<char*>(base)};
      zeros = arena.take<A>(pitch);
      before = arena.take<T>((kTokens + taps - 1) * pitch);
      p = arena.take<A>((kConvRun + taps - 1) * pitch);
      sums = arena.take<A>((taps + 1) * pitch);
      dstate = arena.take<A>(kTokens * pitch);
      row = arena.take<A>(pitch);
      bytes = arena.used;
    }
  };

  static size_t scratch_bytes(const CausalConvArgs& a, int64_t channels) {
    return Scratch(a, channels, nullptr).bytes;
  }

  // Where a run lies in tensors [B, T, D] and [N, D, L].
  struct Place {
    const ConvRun& run;
    int64_t dilation, state_length, first, channels;

    Place(const CausalConvArgs& a, const ConvRun& run, int64_t first, int64_t last)
        : run(run),
          dilation(a.dilation),
          state_length((a.weight.shape[1] - 1) * a.dilation),
          first(first),
          channels(last - first) {}

    // Tokens of the whole sequence in front of the run's token j.
    int64_t position(int64_t j) const { return run.phase + j * dilation; }

    T* row(const TensorView& x, int64_t j) const {
      return static_cast<T*>(x.data) + run.batch * x.stride[0] +
             (run.start + position(j)) * x.stride[1] + first;
    }
    T* state(const TensorView& t, int64_t l) const {
      return static_cast<T*>(t.data) + run.sequence * t.stride[0] + first * t.stride[1] +
             l * t.stride[2];
    }
    template <class X>
    void gather(const TensorView& t, int64_t l, X* to) const {
      const T* const from = state(t, l);
      for (int64_t c = 0; c < channels; ++c) {
        if constexpr (sizeof(X) == sizeof(T)) {
          to[c] = from[c * t.stride[1]];
        } else {
          to[c] = to_acc(from[c * t.stride[1]]);
        }
      }
    }
  };

  // The inputs of tokens [j, j + count), and the W - 1 before them.
  static void inputs(const CausalConvArgs& a, const Place& at, const Scratch& s, int64_t j,
                     int64_t count, const T** rows) {
    const int64_t taps = a.weight.shape[1];
    for (int64_t i = 0; i < count + taps - 1; ++i) {
      const int64_t input = j + i - (taps - 1);
      if (input >= 0) {
        rows[i] = at.row(a.x, input);
      } else if (a.initial_state.data == nullptr) {
        rows[i] = reinterpret_cast<const T*>(s.zeros);
      } else {
        T* const to = s.before + i * s.pitch;
        at.gather(a.initial_state, at.state_length + at.position(input), to);
        rows[i] = to;
      }
    }
  }

  // sums[r] += sum_i weights[i] rows[r + i] at column c, the weights `pitch` apart.
  template <int N, int R, class X, class Vector>
  static MK_INLINE void convolve(int64_t taps, const A* weights, int64_t pitch,
                                 const X* const* rows, int64_t c, Vector vector, Vec<A>* sums) {
    const int64_t count = N > 0 ? N : taps;
#pragma GCC unroll 4
    for (int64_t i = 0; i < count; ++i) {
      const Vec<A> w = vector.load(weights + i * pitch + c);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sums[r] += w * vector.load(rows[r + i] + c);
    }
  }

  template <int N, bool kSilu>
  static void forward_run(const CausalConvArgs& a, const A* packed, const Place& at,
                          const Scratch& s) {
    const int64_t taps = a.weight.shape[1], pitch = a.weight.shape[0];
    const A *const weights = packed + at.first, *const bias = weights + taps * pitch;
    for_tokens(at.run.begin, at.run.end,
               [&](auto tokens, int64_t j) __attribute__((always_inline)) {
                 constexpr int R = decltype(tokens)::value;
                 const T* rows[kTokens + kMostTaps - 1];
                 inputs(a, at, s, j, R, rows);
                 T* out[R];
                 for (int r = 0; r < R; ++r) out[r] = at.row(a.out, j + r);
                 for_columns<A>(
                     at.channels, [&](int64_t c, auto vector, int) __attribute__((always_inline)) {
                       Vec<A> sums[R];
                       for (int r = 0; r < R; ++r) sums[r] = vector.load(bias + c);
                       convolve<N, R>(taps, weights, pitch, rows, c, vector, sums);
                       for (int r = 0; r < R; ++r) {
                         vector.store(out[r] + c, kSilu ? sums[r] * sigmoid<A>(sums[r]) : sums[r]);
                       }
                     });
               });
  }

  static void forward(const CausalConvArgs& a, const void* packed, const ConvRun* runs,
                      int64_t num_runs, int64_t first, int64_t last, void* scratch) {
    const Scratch s(a, last - first, scratch);
    memset(s.zeros, 0, s.pitch * sizeof(A));
    for_taps(a.weight.shape[1], [&](auto taps) __attribute__((always_inline)) {
      constexpr int N = decltype(taps)::value;
      for (int64_t i = 0; i < num_runs; ++i) {
        const Place at(a, runs[i], first, last);
        const A* const weights = static_cast<const A*>(packed);
        if (a.activation == ConvActivation::silu) {
          forward_run<N, true>(a, weights, at, s);
        } else {
          forward_run<N, false>(a, weights, at, s);
        }
      }
    });
  }

  static void final_state(const CausalConvArgs& a, int64_t sequence, int64_t batch, int64_t start,
                          int64_t length) {
    const int64_t channels = a.state.shape[1], size = a.state.shape[2];
    const int64_t old = length < size ? size - length : 0;  // that many are left of the initial one
    const T* const x = static_cast<const T*>(a.x.data) + batch * a.x.stride[0] +
                       (start + length - size) * a.x.stride[1];
    const TensorView& initial = a.initial_state;
    const T* const before = static_cast<const T*>(initial.data) + sequence * initial.stride[0] +
                            length * initial.stride[2];
    T* to = static_cast<T*>(a.state.data) + sequence * channels * size;
    for (int64_t c = 0; c < channels; ++c, to += size) {
      for (int64_t l = 0; l < old; ++l) {
        to[l] =
            initial.data == nullptr ? T{} : before[c * initial.stride[1] + l * initial.stride[2]];
      }
      for (int64_t l = old; l < size; ++l) to[l] = x[l * a.x.stride[1] + c];
    }
  }

  // p of tokens [begin, end) of a run; with kSums also what they add to dweight and dbias.
  template <int N, bool kSilu, bool kSums>
  static void gradient_rows(const CausalConvArgs& a, const CausalConvGrads& g, const A* packed,
                            const Place& at, const Scratch& s, int64_t begin, int64_t end) {
    const int64_t taps = N > 0 ? N : a.weight.shape[1], pitch = a.weight.shape[0];
    const A *const weights = packed + at.first, *const bias = weights + taps * pitch;
    for_tokens(begin, end, [&](auto tokens, int64_t j) __attribute__((always_inline)) {
      constexpr int R = decltype(tokens)::value;
      const T *rows[kTokens + kMostTaps - 1], *dout[R];
      if (kSilu || kSums) inputs(a, at, s, j, R, rows);
      for (int r = 0; r < R; ++r) dout[r] = at.row(g.dout, j + r);
      A* const p = s.p + (j - at.run.begin) * s.pitch;
      for_columns<A>(at.channels, [&](int64_t c, auto vector, int) __attribute__((always_inline)) {
        Vec<A> grads[R];
        for (int r = 0; r < R; ++r) grads[r] = vector.load(dout[r] + c);
        if (kSilu) {
          Vec<A> y[R];
          for (int r = 0; r < R; ++r) y[r] = vector.load(bias + c);
          convolve<N, R>(taps, weights, pitch, rows, c, vector, y);
          for (int r = 0; r < R; ++r) {
            const Vec<A> gate = sigmoid<A>(y[r]);
            grads[r] *= gate * (1 + y[r] * (1 - gate));
          }
        }
        for (int r = 0; r < R; ++r) vector.store(p + r * s.pitch + c, grads[r]);
        if (!kSums) return;
#pragma GCC unroll 4
        for (int64_t i = 0; i < taps; ++i) {
          Vec<A> sum = load(s.sums + i * s.pitch + c);
          for (int r = 0; r < R; ++r) sum += grads[r] * vector.load(rows[r + i] + c);
          store(s.sums + i * s.pitch + c, sum);
        }
        Vec<A> sum = load(s.sums + taps * s.pitch + c);
        for (int r = 0; r < R; ++r) sum += grads[r];
        store(s.sums + taps * s.pitch + c, sum);
      });
    });
  }

  // Gradients of the inputs of tokens [begin, end), negative ones the initial state's. write(token,
  // column, vector, gradient) takes them.
  template <int N, int R, class Write>
  static MK_INLINE void input_gradient(const CausalConvArgs& a, const CausalConvGrads& g,
                                       const A* packed, const Place& at, const Scratch& s,
                                       int64_t count, int64_t j, const Write& write) {
    const int64_t taps = N > 0 ? N : a.weight.shape[1], pitch = a.weight.shape[0];
    const A *rows[kTokens + kMostTaps - 1], *start[R];
    for (int64_t i = 0; i < R + taps - 1; ++i) {
      const bool there = j + i >= 0 && j + i < count;
      rows[i] = there ? s.p + (j + i - at.run.begin) * s.pitch : s.zeros;
    }
    for (int r = 0; r < R; ++r) {
      const int64_t l = at.state_length + at.position(j + r) - at.run.length;
      start[r] = s.zeros;
      if (l < 0 || g.dstate.data == nullptr) continue;
      A* const to = s.dstate + r * s.pitch;
      at.gather(g.dstate, l, to);
      start[r] = to;
    }
    const A* const turned = packed + (taps - 1) * pitch + at.first;
    for_columns<A>(at.channels, [&](int64_t c, auto vector, int) __attribute__((always_inline)) {
      Vec<A> sums[R];
      for (int r = 0; r < R; ++r) sums[r] = vector.load(start[r] + c);
      convolve<N, R>(taps, turned, -pitch, rows, c, vector, sums);
      for (int r = 0; r < R; ++r) write(r, c, vector, sums[r]);
    });
  }

  template <int N, bool kSilu>
  static void backward_run(const CausalConvArgs& a, const CausalConvGrads& g, const A* packed,
                           const Place& at, const Scratch& s, A* part) {
    const int64_t taps = a.weight.shape[1], pitch = a.weight.shape[0];
    const ConvRun& run = at.run;
    const int64_t left = run.length - run.phase;
    const int64_t count = left > 0 ? (left - 1) / at.dilation + 1 : 0;
    if (part == nullptr) {
      gradient_rows<N, kSilu, false>(a, g, packed, at, s, run.begin, run.end);
    } else {
      memset(s.sums, 0, (taps + 1) * s.pitch * sizeof(A));
      gradient_rows<N, kSilu, true>(a, g, packed, at, s, run.begin, run.end);
      for (int64_t i = 0; i <= taps; ++i) {
        A* const to = part + i * pitch + at.first;
        for (int64_t c = 0; c < at.channels; ++c) to[c] += s.sums[i * s.pitch + c];
      }
    }
    if (g.dx.data == nullptr && g.dinitial_state.data == nullptr) return;
    const int64_t needed = run.end + taps - 1;
    gradient_rows<N, kSilu, false>(a, g, packed, at, s, run.end, needed < count ? needed : count);
    if (g.dx.data != nullptr) {
      for_tokens(run.begin, run.end, [&](auto tokens, int64_t j) __attribute__((always_inline)) {
        constexpr int R = decltype(tokens)::value;
        T* dx[R];
        for (int r = 0; r < R; ++r) dx[r] = at.row(g.dx, j + r);
        input_gradient<N, R>(a, g, packed, at, s, count, j,
                             [&](int r, int64_t c, auto vector, Vec<A> grad)
                                 __attribute__((always_inline)) { vector.store(dx[r] + c, grad); });
      });
    }
    if (g.dinitial_state.data == nullptr || run.begin > 0) return;
    const int64_t size = at.state_length;
    for (int64_t j = 1 - taps; j < 0; ++j) {
      input_gradient<N, 1>(a, g, packed, at, s, count, j,
                           [&](int, int64_t c, auto vector, Vec<A> grad)
                               __attribute__((always_inline)) { vector.store(s.row + c, grad); });
      T* const to = at.state(g.dinitial_state, size + at.position(j));
      for (int64_t c = 0; c < at.channels; ++c) to[c * size] = from_acc<T>(s.row[c]);
    }
  }

  static void backward(const CausalConvArgs& a, const CausalConvGrads& g, const void* packed,
                       const ConvRun* runs, int64_t num_runs, int64_t first, int64_t last,
                       void* part, void* scratch) {
    const Scratch s(a, last - first, scratch);
    memset(s.zeros, 0, s.pitch * sizeof(A));
    const int64_t pitch = a.weight.shape[0];
    A* const sums = static_cast<A*>(part);
    for (int64_t i = 0; sums != nullptr && i <= a.weight.shape[1]; ++i) {
      memset(sums + i * pitch + first, 0, (last - first) * sizeof(A));
    }
    for_taps(a.weight.shape[1], [&](auto taps) __attribute__((always_inline)) {
      constexpr int N = decltype(taps)::value;
      for (int64_t i = 0; i < num_runs; ++i) {
        const Place at(a, runs[i], first, last);
        const A* const weights = static_cast<const A*>(packed);
        if (a.activation == ConvActivation::silu) {
          backward_run<N, true>(a, g, weights, at, s, sums);
        } else {
          backward_run<N, false>(a, g, weights, at, s, sums);
        }
      }
    });
  }

  static void add_parts(const CausalConvArgs& a, const CausalConvGrads& g, const void* parts,
                        size_t part_bytes, int64_t num_parts, int64_t first, int64_t last) {
    const int64_t channels = a.weight.shape[0], taps = a.weight.shape[1];
    A *const dweight = static_cast<A*>(g.dweight.data), *const dbias =
                                                            static_cast<A*>(g.dbias.data);
    for (int64_t i = 0; i <= taps; ++i) {
      A* const to = i < taps ? dweight + i : dbias;
      if ((i < taps ? dweight : dbias) == nullptr) continue;
      const int64_t step = i < taps ? taps : 1;
      const int64_t pitch = part_bytes / sizeof(A);
      const A* const from = static_cast<const A*>(parts) + i * channels;
      for (int64_t d = first; d < last; ++d) {
        A sum = 0;
        for (int64_t p = 0; p < num_parts; ++p) sum += from[p * pitch + d];
        to[d * step] = sum;
      }
    }
  }
};

// What reads weights where they are.
template <class T, class Weight>
struct ConvWeights {
  using A = Acc<T>;

  static void pack(const CausalConvArgs& a, void* packed) {
    const int64_t channels = a.weight.shape[0], taps = a.weight.shape[1];
    const Weight* weight = static_cast<const Weight*>(a.weight.data);
    const Weight* bias = static_cast<const Weight*>(a.bias.data);
    A* const to = static_cast<A*>(packed);
    for (int64_t d = 0; d < channels; ++d, weight += a.weight.stride[0]) {
      for (int64_t i = 0; i < taps; ++i) to[i * channels + d] = to_acc(weight[i]);
      to[taps * channels + d] = bias == nullptr ? A(0) : to_acc(bias[d * a.bias.stride[0]]);
    }
  }

  template <int N>
  static void step_row(const CausalConvStepArgs& a, int64_t row, int64_t slot) {
    const int64_t channels = a.weight.shape[0], taps = N > 0 ? N : a.weight.shape[1];
    const int64_t dilation = N > 0 ? 1 : a.dilation, size = (taps - 1) * dilation;
    const T* const x = static_cast<const T*>(a.x.data) + row * a.x.stride[0];
    const Weight* weight = static_cast<const Weight*>(a.weight.data);
    const Weight* const bias = static_cast<const Weight*>(a.bias.data);
    T* state = static_cast<T*>(a.state.data) + slot * a.state.stride[0];
    T* const out = static_cast<T*>(a.out.data) + row * channels;
    constexpr int64_t kChannels = 64;
    for (int64_t first = 0; first < channels; first += kChannels) {
      const int64_t count = channels - first < kChannels ? channels - first : kChannels;
      A y[kChannels];
      for (int64_t d = 0; d < count; ++d, weight += a.weight.stride[0], state += size) {
        const int64_t c = first + d;
        A sum = bias == nullptr ? A(0) : to_acc(bias[c * a.bias.stride[0]]);
        for (int64_t i = 0; i < taps - 1; ++i) {
          sum += to_acc(weight[i]) * to_acc(state[i * dilation]);
        }
        y[d] = sum + to_acc(weight[taps - 1]) * to_acc(x[c]);
        for (int64_t l = 0; l + 1 < size; ++l) state[l] = state[l + 1];
        if (size > 0) state[size - 1] = x[c];
      }
      for_columns<A>(count, [&](int64_t c, auto vector, int) __attribute__((always_inline)) {
        const Vec<A> v = vector.load(y + c);
        const bool silu = a.activation == ConvActivation::silu;
        vector.store(out + first + c, silu ? v * sigmoid<A>(v) : v);
      });
    }
  }

  static void step(const CausalConvStepArgs& a, const int64_t* slots, int64_t begin, int64_t end) {
    const int64_t channels = a.weight.shape[0];
    for_taps(a.dilation == 1 ? a.weight.shape[1] : 0,
             [&](auto taps) __attribute__((always_inline)) {
               for (int64_t row = begin; row < end; ++row) {
                 if (slots[row] < 0) {
                   memset(static_cast<T*>(a.out.data) + row * channels, 0, channels * sizeof(T));
                 } else {
                   step_row<decltype(taps)::value>(a, row, slots[row]);
                 }
               }
             });
  }
};

template <class T, class Weight = T>
constexpr CausalConvKernel kernel_for() {
  using C = CausalConv<T>;
  return {ConvWeights<T, Weight>::pack,
          C::scratch_bytes,
          C::forward,
          C::backward,
          C::add_parts,
          C::final_state};
}

}  // namespace

namespace cpu::MEMKERNELS_ISA {

CausalConvKernel causal_conv_kernel(Dtype dtype, bool wide_weight) {
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

CausalConvStepKernel causal_conv_step_kernel(Dtype dtype, bool wide_weight) {
  switch (dtype) {
    case Dtype::bf16:
      return wide_weight ? ConvWeights<bf16, float>::step : ConvWeights<bf16, bf16>::step;
    case Dtype::f16:
      return wide_weight ? ConvWeights<f16, float>::step : ConvWeights<f16, f16>::step;
#if defined(MEMKERNELS_BASELINE)
    case Dtype::f64:
      return ConvWeights<double, double>::step;
#endif
    default:
      return ConvWeights<float, float>::step;
  }
}

}  // namespace cpu::MEMKERNELS_ISA
}  // namespace memkernels::scan
