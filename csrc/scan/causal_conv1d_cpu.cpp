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
#include "core/cpu/columns.h"

namespace memkernels::scan {
namespace {

constexpr int kTokens = 4;
constexpr int kMostTaps = 16;

// Vectors of channels from `first` up to `last`.
template <class Vector>
struct Columns {
  int64_t first, last;
  Vector vector;
};

// body(taps, tokens, first of them, columns) for all channels of tokens [begin, end): kTokens at
// once, or 1. Taps are 0 where loops over them are not worth a copy of the code.
template <class A, class Body>
MK_INLINE void for_tokens(int64_t taps, int64_t channels, int64_t begin, int64_t end,
                          const Body& body) {
  const int64_t whole = channels / kLanes<A> * kLanes<A>;
  const Columns<WholeVector> columns{0, whole, {}};
  int64_t j = begin;
  for (; j + kTokens <= end; j += kTokens) {
    switch (taps) {
      case 2:
        body(Int<2>{}, Int<kTokens>{}, j, columns);
        break;
      case 3:
        body(Int<3>{}, Int<kTokens>{}, j, columns);
        break;
      case 4:
        body(Int<4>{}, Int<kTokens>{}, j, columns);
        break;
      default:
        body(Int<0>{}, Int<kTokens>{}, j, columns);
    }
  }
  for (; j < end; ++j) body(Int<0>{}, Int<1>{}, j, columns);
  if (whole == channels) return;
  const Columns<PartOfVector> rest{whole, channels, {channels - whole}};
  for (j = begin; j < end; ++j) body(Int<0>{}, Int<1>{}, j, rest);
}

template <class T>
struct CausalConv {
  using A = Acc<T>;
  static constexpr int W = kLanes<A>;

  struct Scratch {
    int64_t pitch;
    A* zeros;   // [C]
    T* before;  // [kTokens + W - 1, C]: inputs before the sequence
    // The backward's:
    A* p;       // [kConvRun + W - 1, C]
    A* sums;    // [W + 1, C]: dweight and dbias of a run
    A* dstate;  // [kTokens, C]: what a final state's gradient adds
    size_t bytes;
    Scratch(const CausalConvArgs& a, int64_t channels, void* base) : pitch(round_up(channels, W)) {
      const int64_t taps = a.weight.shape[1];
      Arena arena{static_cast<char*>(base)};
      zeros = arena.take<A>(pitch);
      before = arena.take<T>((kTokens + taps - 1) * pitch);
      p = arena.take<A>((kConvRun + taps - 1) * pitch);
      sums = arena.take<A>((taps + 1) * pitch);
      dstate = arena.take<A>(kTokens * pitch);
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
    __attribute__((noinline)) void gather(const TensorView& t, int64_t l, X* to) const {
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
  __attribute__((noinline)) static void inputs(const CausalConvArgs& a, const Place& at,
                                               const Scratch& s, int64_t j, int64_t count,
                                               const T** rows) {
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

  static void forward_run(const CausalConvArgs& a, const A* packed, const Place& at,
                          const Scratch& s) {
    const int64_t taps = a.weight.shape[1], pitch = a.weight.shape[0];
    const A *const weights = packed + at.first, *const bias = weights + taps * pitch;
    const bool silu = a.activation == ConvActivation::silu;
    const auto tokens_from = [&](auto unrolled, auto tokens, int64_t j,
                                 auto columns) __attribute__((always_inline)) {
      constexpr int N = decltype(unrolled)::value, R = decltype(tokens)::value;
      const T* rows[kTokens + kMostTaps - 1];
      inputs(a, at, s, j, R, rows);
      T* out[R];
      for (int r = 0; r < R; ++r) out[r] = at.row(a.out, j + r);
      for (int64_t c = columns.first; c < columns.last; c += W) {
        Vec<A> y[R];
        for (int r = 0; r < R; ++r) y[r] = columns.vector.load(bias + c);
        convolve<N, R>(taps, weights, pitch, rows, c, columns.vector, y);
        for (int r = 0; r < R; ++r) {
          if (silu) y[r] *= sigmoid<A>(y[r]);
          columns.vector.store(out[r] + c, y[r]);
        }
      }
    };
    for_tokens<A>(taps, at.channels, at.run.begin, at.run.end, tokens_from);
  }

  static void forward(const CausalConvArgs& a, const void* packed, const ConvRun* runs,
                      int64_t num_runs, int64_t first, int64_t last, void* scratch) {
    const Scratch s(a, last - first, scratch);
    memset(s.zeros, 0, s.pitch * sizeof(A));
    for (int64_t i = 0; i < num_runs; ++i) {
      forward_run(a, static_cast<const A*>(packed), Place(a, runs[i], first, last), s);
    }
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

  // p of tokens [begin, end) of a run; with `sums`, adds their part of dweight and dbias to s.sums.
  static void token_gradients(const CausalConvArgs& a, const CausalConvGrads& g, const A* packed,
                              const Place& at, const Scratch& s, int64_t begin, int64_t end,
                              bool sums) {
    const int64_t taps = a.weight.shape[1], pitch = a.weight.shape[0];
    const A *const weights = packed + at.first, *const bias = weights + taps * pitch;
    const bool silu = a.activation == ConvActivation::silu;
    const auto tokens_from = [&](auto unrolled, auto tokens, int64_t j,
                                 auto columns) __attribute__((always_inline)) {
      constexpr int N = decltype(unrolled)::value, R = decltype(tokens)::value;
      const T *rows[kTokens + kMostTaps - 1], *dout[R];
      if (silu || sums) inputs(a, at, s, j, R, rows);
      for (int r = 0; r < R; ++r) dout[r] = at.row(g.dout, j + r);
      A* const p = s.p + (j - at.run.begin) * s.pitch;
      const auto vector = columns.vector;
      for (int64_t c = columns.first; c < columns.last; c += W) {
        Vec<A> grads[R];
        for (int r = 0; r < R; ++r) grads[r] = vector.load(dout[r] + c);
        if (silu) {
          Vec<A> y[R];
          for (int r = 0; r < R; ++r) y[r] = vector.load(bias + c);
          convolve<N, R>(taps, weights, pitch, rows, c, vector, y);
          for (int r = 0; r < R; ++r) {
            const Vec<A> gate = sigmoid<A>(y[r]);
            grads[r] *= gate * (1 + y[r] * (1 - gate));
          }
        }
        for (int r = 0; r < R; ++r) vector.store(p + r * s.pitch + c, grads[r]);
        if (!sums) continue;
        const int64_t count = N > 0 ? N : taps;
#pragma GCC unroll 4
        for (int64_t i = 0; i < count; ++i) {
          Vec<A> sum = load(s.sums + i * s.pitch + c);
          for (int r = 0; r < R; ++r) sum += grads[r] * vector.load(rows[r + i] + c);
          store(s.sums + i * s.pitch + c, sum);
        }
        Vec<A> sum = load(s.sums + taps * s.pitch + c);
        for (int r = 0; r < R; ++r) sum += grads[r];
        store(s.sums + taps * s.pitch + c, sum);
      }
    };
    for_tokens<A>(taps, at.channels, begin, end, tokens_from);
  }

  // dx of the run's tokens, of `count` that lie a dilation apart, from their p and that of the W -
  // 1 after them; and, of the first run, the initial state's gradient.
  static void input_gradients(const CausalConvArgs& a, const CausalConvGrads& g, const A* packed,
                              const Place& at, const Scratch& s, int64_t count) {
    const int64_t taps = a.weight.shape[1], pitch = a.weight.shape[0];
    const A* const last_weights = packed + (taps - 1) * pitch + at.first;
    const auto tokens_from = [&](auto unrolled, auto tokens, int64_t j,
                                 auto columns) __attribute__((always_inline)) {
      constexpr int N = decltype(unrolled)::value, R = decltype(tokens)::value;
      const A *rows[kTokens + kMostTaps - 1], *start[R];
      for (int64_t i = 0; i < R + taps - 1; ++i) {
        const bool there = j + i >= 0 && j + i < count;
        rows[i] = there ? s.p + (j + i - at.run.begin) * s.pitch : s.zeros;
      }
      T* dx[R];
      for (int r = 0; r < R; ++r) {
        dx[r] = j < 0 ? s.before + r * s.pitch : at.row(g.dx, j + r);
        const int64_t l = at.state_length + at.position(j + r) - at.run.length;
        start[r] = s.zeros;
        if (l < 0 || g.dstate.data == nullptr) continue;
        A* const to = s.dstate + r * s.pitch;
        at.gather(g.dstate, l, to);
        start[r] = to;
      }
      for (int64_t c = columns.first; c < columns.last; c += W) {
        Vec<A> sums[R];
        for (int r = 0; r < R; ++r) sums[r] = columns.vector.load(start[r] + c);
        convolve<N, R>(taps, last_weights, -pitch, rows, c, columns.vector, sums);
        for (int r = 0; r < R; ++r) columns.vector.store(dx[r] + c, sums[r]);
      }
      for (int r = 0; j < 0 && r < R; ++r) {
        const int64_t size = at.state_length;
        T* const to = at.state(g.dinitial_state, size + at.position(j + r));
        for (int64_t c = columns.first; c < columns.last; ++c) to[c * size] = dx[r][c];
      }
    };
    const bool for_initial = g.dinitial_state.data != nullptr && at.run.begin == 0;
    const int64_t ranges[2][2] = {{for_initial ? 1 - taps : 0, 0},
                                  {at.run.begin, g.dx.data != nullptr ? at.run.end : at.run.begin}};
    for (const auto& range : ranges) {
      for_tokens<A>(taps, at.channels, range[0], range[1], tokens_from);
    }
  }

  static void backward_run(const CausalConvArgs& a, const CausalConvGrads& g, const A* packed,
                           const Place& at, const Scratch& s, A* part) {
    const int64_t taps = a.weight.shape[1], pitch = a.weight.shape[0];
    const ConvRun& run = at.run;
    if (part != nullptr) memset(s.sums, 0, (taps + 1) * s.pitch * sizeof(A));
    token_gradients(a, g, packed, at, s, run.begin, run.end, part != nullptr);
    for (int64_t i = 0; part != nullptr && i <= taps; ++i) {
      A* const to = part + i * pitch + at.first;
      for (int64_t c = 0; c < at.channels; ++c) to[c] += s.sums[i * s.pitch + c];
    }
    if (g.dx.data == nullptr && g.dinitial_state.data == nullptr) return;
    const int64_t left = run.length - run.phase;
    const int64_t count = left > 0 ? (left - 1) / at.dilation + 1 : 0;
    const int64_t needed = run.end + taps - 1 < count ? run.end + taps - 1 : count;
    token_gradients(a, g, packed, at, s, run.end, needed, false);
    input_gradients(a, g, packed, at, s, count);
  }

  static void backward(const CausalConvArgs& a, const CausalConvGrads& g, const void* packed,
                       const ConvRun* runs, int64_t num_runs, int64_t first, int64_t last,
                       void* part, void* scratch) {
    const Scratch s(a, last - first, scratch);
    memset(s.zeros, 0, s.pitch * sizeof(A));
    A* const sums = static_cast<A*>(part);
    for (int64_t i = 0; sums != nullptr && i <= a.weight.shape[1]; ++i) {
      memset(sums + i * a.weight.shape[0] + first, 0, (last - first) * sizeof(A));
    }
    for (int64_t i = 0; i < num_runs; ++i) {
      backward_run(a, g, static_cast<const A*>(packed), Place(a, runs[i], first, last), s, sums);
    }
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
    const bool common = a.weight.shape[1] == 4 && a.dilation == 1;
    for (int64_t row = begin; row < end; ++row) {
      if (slots[row] < 0) {
        memset(static_cast<T*>(a.out.data) + row * channels, 0, channels * sizeof(T));
      } else if (common) {
        step_row<4>(a, row, slots[row]);
      } else {
        step_row<0>(a, row, slots[row]);
      }
    }
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
