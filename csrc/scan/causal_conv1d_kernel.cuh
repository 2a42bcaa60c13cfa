// y[t] = bias + sum_i w_i x[t - (W - 1 - i)], out = y or silu(y), channel by channel, of tokens
// that lie a dilation apart. A warp walks along a run of them, and a lane has some neighbouring
// channels, whose last W inputs stay in registers.
//
// Backward, with p = dout or dout silu'(y), y computed again: dx[s] = sum_i w_i p[s + (W - 1 - i)],
// dw_i = sum_t p[t] x[t - (W - 1 - i)], dbias = sum_t p[t]. The last W of p stay in registers, too;
// a run goes on behind its end until all its inputs have met theirs. Blocks leave their parts of dw
// and dbias to another kernel.
//
// Cost of an element in bfloat16: x read and out written once, 4 bytes; backward x and dout read,
// dx written, 6 bytes; and of each run W - 1 tokens more, which caches have. Of 4 taps and silu
// some 20 and 38 instructions of the 29 and 43 that an H200 issues meanwhile: bound by memory.
#pragma once

#include "core/cuda/chunk.cuh"
#include "scan/causal_conv1d_cuda.h"
#include "scan/gates.cuh"
#include "scan/part_sums.cuh"

namespace memkernels::scan::cuda {

// The derivative of silu.
__device__ __forceinline__ float silu_slope(float x) {
  const float gate = sigmoid(x);
  return gate * (1.f + x * (1.f - gate));
}

// A sequence's inputs, those before it included, from a channel on.
template <class T>
struct ConvInputs {
  const ConvParams& p;
  int64_t sequence, length;
  const T *first, *initial;  // the first token; the initial state, or null

  __device__ __forceinline__ ConvInputs(const ConvParams& p, int64_t sequence, const Span& span,
                                        int channel)
      : p(p), sequence(sequence), length(span.end - span.begin), initial(nullptr) {
    first = static_cast<const T*>(p.x) + span.batch * p.x_strides[0] + span.begin * p.x_strides[1] +
            channel;
    if (p.initial_state) {
      initial = static_cast<const T*>(p.initial_state) + sequence * p.initial_strides[0] +
                channel * p.initial_strides[1];
    }
  }

  // How many tokens there are a dilation apart; at most `most`.
  __device__ __forceinline__ int tokens_from(int64_t position, int most) const {
    const int64_t count = (length - position - 1) / p.dilation + 1;
    return static_cast<int>(count < most ? count : most);
  }

  // At a token's position in the sequence, or before it.
  template <int kElements>
  __device__ __forceinline__ Chunk<T, kElements> at(int64_t position) const {
    if (position >= 0) {
      return *reinterpret_cast<const Chunk<T, kElements>*>(first + position * p.x_strides[1]);
    }
    Chunk<T, kElements> chunk{};
    if (initial) {
      const T* const from = initial + (p.state_length + position) * p.initial_strides[2];
#pragma unroll
      for (int e = 0; e < kElements; ++e) chunk.elements[e] = from[e * p.initial_strides[1]];
    }
    return chunk;
  }
};

// What a final state's gradient adds to that of the input at a position of the sequence.
template <class T>
__device__ __forceinline__ float state_gradient(const ConvParams& p, int64_t sequence,
                                                int64_t length, int64_t position, int channel) {
  const int64_t l = p.state_length + position - length;
  if (!p.dstate || l < 0) return 0.f;
  return widen(
      static_cast<const T*>(p.dstate)[sequence * p.dstate_strides[0] +
                                      channel * p.dstate_strides[1] + l * p.dstate_strides[2]]);
}

// Tokens of a sequence, by their positions: from each of [begin, stop), tile_runs apart, those
// before `end` that lie a dilation apart.
struct ConvRun {
  int64_t sequence, begin, stop, end;
  Span span;

  __device__ __forceinline__ ConvRun(const ConvParams& p, int64_t i) {
    const Part part = part_at(p.tiles, i / p.tile_runs);
    sequence = part.sequence;
    span = part.span;
    begin = part.begin + i % p.tile_runs;
    end = clamp(part.begin + p.tiles.length, 0, span.end - span.begin);
    stop = clamp(part.begin + p.dilation, 0, end);
  }

  // How many; there is one at least.
  __device__ __forceinline__ int tokens_from(int64_t first, int64_t dilation) const {
    return static_cast<int>(end - first - 1) / static_cast<int>(dilation) + 1;
  }
};

// The weights of a lane's channels. Those of fewer taps than kTaps come last; the first ones must
// not be used, as what they would meet may be infinite.
template <class T, int kTaps, int kElements>
struct ConvWeights {
  int unused;
  float taps[kTaps][kElements], bias[kElements];

  __device__ __forceinline__ ConvWeights(const ConvParams& p, int channel)
      : unused(kTaps - p.taps) {
    if (p.wide_weight) {
      read(p, static_cast<const float*>(p.weight), static_cast<const float*>(p.bias), channel);
    } else {
      read(p, static_cast<const T*>(p.weight), static_cast<const T*>(p.bias), channel);
    }
  }
  template <class Weight>
  __device__ __forceinline__ void read(const ConvParams& p, const Weight* from_taps,
                                       const Weight* from_bias, int channel) {
    from_taps += channel * p.weight_stride - unused;
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
#pragma unroll
      for (int i = 0; i < kTaps; ++i) taps[i][e] = i < unused ? 0.f : widen(from_taps[i]);
      bias[e] = from_bias ? widen(from_bias[(channel + e) * p.bias_stride]) : 0.f;
      from_taps += p.weight_stride;
    }
  }

  // Of the input at a position, from it and those before.
  __device__ __forceinline__ void convolve(float (&y)[kElements],
                                           const float (&before)[kTaps - 1][kElements],
                                           const float (&current)[kElements]) const {
#pragma unroll
    for (int e = 0; e < kElements; ++e) y[e] = bias[e] + taps[kTaps - 1][e] * current[e];
#pragma unroll
    for (int i = kTaps - 2; i >= 0; --i) {
      if (i < unused) continue;
#pragma unroll
      for (int e = 0; e < kElements; ++e) y[e] += taps[i][e] * before[i][e];
    }
  }
};

template <class T, int kElements>
__device__ __forceinline__ void widen_all(float (&x)[kElements], const Chunk<T, kElements>& chunk) {
#pragma unroll
  for (int e = 0; e < kElements; ++e) x[e] = widen(chunk.elements[e]);
}

// The window of the next token.
template <int kRows, int kElements>
__device__ __forceinline__ void move_on(float (&window)[kRows][kElements],
                                        const float (&current)[kElements]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      window[i][e] = i + 1 < kRows ? window[i + 1][e] : current[e];
    }
  }
}

// The inputs before a token.
template <class T, int kTaps, int kElements>
__device__ __forceinline__ void begin_window(float (&window)[kTaps - 1][kElements],
                                             const ConvInputs<T>& inputs, int64_t position,
                                             int unused) {
#pragma unroll
  for (int i = 0; i < kTaps - 1; ++i) {
    Chunk<T, kElements> chunk{};
    if (i >= unused) {
      chunk = inputs.template at<kElements>(position - (kTaps - 1 - i) * inputs.p.dilation);
    }
    widen_all(window[i], chunk);
  }
}

// A lane's first channel.
template <int kElements>
__device__ __forceinline__ int conv_channel(const ConvParams& p) {
  return (static_cast<int>(blockIdx.x % p.groups) * 32 + threadIdx.x % 32) * kElements;
}

template <class T, int kTaps, int kElements>
__global__ void __launch_bounds__(kConvThreads, kTaps == 4 ? 2 : 1) convolve(const ConvParams p) {
  constexpr int kAhead = 4;
  const int64_t i = int64_t{blockIdx.x / p.groups} * kConvWarps + threadIdx.x / 32;
  const int channel = conv_channel<kElements>(p);
  if (i >= p.num_runs || channel >= p.channels) return;
  const ConvRun run(p, i);
  if (run.begin >= run.stop) return;
  const ConvWeights<T, kTaps, kElements> weights(p, channel);
  const ConvInputs<T> inputs(p, run.sequence, run.span, channel);
  T* const first_out = static_cast<T*>(p.out) +
                       (run.span.batch * p.tiles.sequences.tokens + run.span.begin) * p.channels +
                       channel;
  for (int64_t first = run.begin; first < run.stop; first += p.tile_runs) {
    float before[kTaps - 1][kElements];
    begin_window<T, kTaps>(before, inputs, first, weights.unused);
    const T* x = inputs.first + first * p.x_strides[1];
    T* out = first_out + first * p.channels;
    for (int left = run.tokens_from(first, p.dilation); left > 0; left -= kAhead) {
      Chunk<T, kElements> chunks[kAhead];
#pragma unroll
      for (int ahead = 0; ahead < kAhead; ++ahead) {
        if (ahead < left) chunks[ahead] = *reinterpret_cast<const Chunk<T, kElements>*>(x);
        x += p.x_step;
      }
#pragma unroll
      for (int ahead = 0; ahead < kAhead; ++ahead) {
        float current[kElements], y[kElements];
        widen_all(current, chunks[ahead]);
        weights.convolve(y, before, current);
        if (p.silu) {
#pragma unroll
          for (int e = 0; e < kElements; ++e) y[e] *= sigmoid(y[e]);
        }
        if (ahead < left) store(y, out);
        out += p.out_step;
        move_on(before, current);
      }
    }
  }
}

template <class T, int kTaps, int kElements>
__global__ void __launch_bounds__(kConvBackwardThreads, kTaps == 4 ? 3 : 2)
    convolve_backward(const ConvParams p) {
  using Piece = Chunk<T, kElements>;
  constexpr int kAhead = 4, kColumns = 32 * kElements;
  const int warp = threadIdx.x / 32, channel = conv_channel<kElements>(p);
  const int64_t block = blockIdx.x / p.groups;
  const int64_t first_run = (block * kConvBackwardWarps + warp) * p.warp_runs;
  const int64_t last_run = channel < p.channels ? clamp(first_run + p.warp_runs, 0, p.num_runs) : 0;
  float sums[kTaps + 1][kElements] = {};
  const ConvWeights<T, kTaps, kElements> weights(p, channel < p.channels ? channel : 0);
  for (int64_t i = first_run; i < last_run; ++i) {
    const ConvRun run(p, i);
    const ConvInputs<T> inputs(p, run.sequence, run.span, channel);
    const int64_t begin = run.span.batch * p.tiles.sequences.tokens + run.span.begin;
    for (int64_t first = run.begin; first < run.stop; first += p.tile_runs) {
      float before[kTaps - 1][kElements], grads[kTaps - 1][kElements] = {};
      begin_window<T, kTaps>(before, inputs, first, weights.unused);
      // How many tokens are the run's own, and of how many p is needed.
      const int own = run.tokens_from(first, p.dilation);
      const int needed = p.dx ? inputs.tokens_from(first, own + p.taps - 1) : own;
      const T* x = inputs.first + first * p.x_strides[1];
      const T* dout = static_cast<const T*>(p.dout) + run.span.batch * p.dout_strides[0] +
                      (run.span.begin + first) * p.dout_strides[1] + channel;
      T* dx = static_cast<T*>(p.dx) + (begin + first) * p.channels + channel;
      for (int next = 0; next < (p.dx ? own + kTaps - 1 : own); next += kAhead) {
        Piece xs[kAhead], douts[kAhead];
#pragma unroll
        for (int ahead = 0; ahead < kAhead; ++ahead) {
          xs[ahead] = next + ahead < needed ? *reinterpret_cast<const Piece*>(x) : Piece{};
          douts[ahead] = next + ahead < needed ? *reinterpret_cast<const Piece*>(dout) : Piece{};
          x += p.x_step;
          dout += p.dout_step;
        }
#pragma unroll
        for (int ahead = 0; ahead < kAhead; ++ahead) {
          const int token = next + ahead;
          float current[kElements], grad[kElements];
          widen_all(current, xs[ahead]);
          widen_all(grad, douts[ahead]);
          if (p.silu) {
            float y[kElements];
            weights.convolve(y, before, current);
#pragma unroll
            for (int e = 0; e < kElements; ++e) grad[e] *= silu_slope(y[e]);
          }
          if (token >= needed) {
#pragma unroll
            for (int e = 0; e < kElements; ++e) grad[e] = 0.f;
          }
          if (token < own) {
#pragma unroll
            for (int tap = 0; tap < kTaps - 1; ++tap) {
              if (tap < weights.unused) continue;
#pragma unroll
              for (int e = 0; e < kElements; ++e) sums[tap][e] += grad[e] * before[tap][e];
            }
#pragma unroll
            for (int e = 0; e < kElements; ++e) {
              sums[kTaps - 1][e] += grad[e] * current[e];
              sums[kTaps][e] += grad[e];
            }
          }
          // The input so many taps earlier has met all that it went into.
          const int input = token - (kTaps - 1);
          if (p.dx && input >= 0 && input < own) {
            float sum[kElements] = {};
            if (p.dstate) {
#pragma unroll
              for (int e = 0; e < kElements; ++e) {
                sum[e] = state_gradient<T>(p, run.sequence, inputs.length,
                                           first + input * p.dilation, channel + e);
              }
            }
#pragma unroll
            for (int e = 0; e < kElements; ++e) sum[e] += weights.taps[kTaps - 1][e] * grads[0][e];
#pragma unroll
            for (int tap = kTaps - 2; tap >= 0; --tap) {
              if (tap < weights.unused) continue;
#pragma unroll
              for (int e = 0; e < kElements; ++e) {
                sum[e] += weights.taps[tap][e] * (tap > 0 ? grads[kTaps - 1 - tap][e] : grad[e]);
              }
            }
            store(sum, dx);
            dx += p.out_step;
          }
          move_on(before, current);
          move_on(grads, grad);
        }
      }
    }
  }
  if (!p.parts) return;
  const auto all = reinterpret_cast<float*>(shared_memory());  // [warps, kTaps + 1, columns]
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int tap = 0; tap <= kTaps; ++tap) {
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      all[(warp * (kTaps + 1) + tap) * kColumns + lane * kElements + e] = sums[tap][e];
    }
  }
  __syncthreads();
  const int first_channel = static_cast<int>(blockIdx.x % p.groups) * kColumns;
  for (int i = threadIdx.x; i < (kTaps + 1) * kColumns; i += kConvBackwardThreads) {
    const int tap = i / kColumns - weights.unused, c = first_channel + i % kColumns;
    if (tap < 0 || c >= p.channels) continue;
    float sum = 0.f;
    for (int w = 0; w < kConvBackwardWarps; ++w) sum += all[w * (kTaps + 1) * kColumns + i];
    p.parts[(block * (p.taps + 1) + tap) * p.channels + c] = sum;
  }
}

static __global__ void __launch_bounds__(kAddThreads) add_conv_parts(const ConvPartsParams p) {
  const int64_t numbers = int64_t{p.taps + 1} * p.channels;
  const int64_t i = int64_t{blockIdx.x} * 32 + threadIdx.x % 32;
  const float sum = sum_of_parts(p.parts, p.num_parts, numbers, i);
  if (threadIdx.x >= 32 || i >= numbers) return;
  const int64_t tap = i / p.channels, channel = i % p.channels;
  if (tap == p.taps) {
    if (p.dbias) p.dbias[channel] = sum;
  } else if (p.dweight) {
    p.dweight[channel * p.taps + tap] = sum;
  }
}

// An element of the states, neighbouring ones of neighbouring channels.
struct ConvStatePlace {
  int64_t sequence, l, offset;
  int channel;

  __device__ __forceinline__ ConvStatePlace(const ConvParams& p, int64_t i)
      : sequence(i / p.channels / p.state_length),
        l(i / p.channels % p.state_length),
        channel(static_cast<int>(i % p.channels)) {
    offset = (sequence * p.channels + channel) * p.state_length + l;
  }
};

template <class T>
__global__ void __launch_bounds__(kConvThreads) final_conv_states(const ConvParams p) {
  const int64_t i = int64_t{blockIdx.x} * kConvThreads + threadIdx.x;
  if (i >= p.tiles.sequences.count * p.state_length * p.channels) return;
  const ConvStatePlace place(p, i);
  const ConvInputs<T> inputs(p, place.sequence, span_of(p.tiles.sequences, place.sequence),
                             place.channel);
  const int64_t position = inputs.length - p.state_length + place.l;
  static_cast<T*>(p.state)[place.offset] = inputs.template at<1>(position).elements[0];
}

// The gradients of the inputs before a sequence.
template <class T>
__global__ void __launch_bounds__(kConvThreads) initial_conv_gradients(const ConvParams p) {
  const int64_t i = int64_t{blockIdx.x} * kConvThreads + threadIdx.x;
  if (i >= p.tiles.sequences.count * p.state_length * p.channels) return;
  const ConvStatePlace place(p, i);
  const int channel = place.channel;
  const Span span = span_of(p.tiles.sequences, place.sequence);
  const ConvInputs<T> inputs(p, place.sequence, span, channel);
  const T* const dout = static_cast<const T*>(p.dout) + span.batch * p.dout_strides[0] +
                        span.begin * p.dout_strides[1] + channel;
  const auto weight = [&](int tap) {
    return companion_at<T>(p.weight, p.wide_weight, channel * p.weight_stride + tap);
  };
  const int64_t position = place.l - p.state_length;
  float sum = state_gradient<T>(p, place.sequence, inputs.length, position, channel);
  for (int later = 0; later < p.taps; ++later) {
    const int64_t t = position + later * p.dilation;
    if (t < 0 || t >= inputs.length) continue;
    float grad = widen(dout[t * p.dout_strides[1]]);
    if (p.silu) {
      float y = p.bias ? companion_at<T>(p.bias, p.wide_weight, channel * p.bias_stride) : 0.f;
      for (int tap = 0; tap < p.taps; ++tap) {
        const int64_t input = t - (p.taps - 1 - tap) * p.dilation;
        y += weight(tap) * widen(inputs.template at<1>(input).elements[0]);
      }
      grad *= silu_slope(y);
    }
    sum += weight(p.taps - 1 - later) * grad;
  }
  narrow(sum, static_cast<T*>(p.dinitial_state)[place.offset]);
}

// ---- steps --------------------------------------------------------------------------------------
// x and out of a row, its state read and written: 2 (1 + L) times 2 bytes a channel in bfloat16.

// Of 4 taps that are neighbours. A thread has some channels of a row, and so a stretch of its slot.
template <class T>
__global__ void __launch_bounds__(kConvThreads) step_4_taps(const ConvStepParams p) {
  constexpr int kElements = 16 / sizeof(T), kLength = 3;
  const int64_t i = int64_t{blockIdx.x} * kConvThreads + threadIdx.x;
  const int64_t pieces = p.channels / kElements, row = i / pieces;
  if (row >= p.rows) return;
  const int64_t channel = i % pieces * kElements;
  const int64_t slot = slot_of(p.state_indices, row, p.slots);
  float y[kElements] = {};
  if (slot >= 0) {
    using Inputs = Chunk<T, kElements * kLength>;
    const auto x = *reinterpret_cast<const Chunk<T, kElements>*>(static_cast<const T*>(p.x) +
                                                                 row * p.x_stride + channel);
    auto& state = *reinterpret_cast<Inputs*>(static_cast<T*>(p.state) + slot * p.state_stride +
                                             channel * kLength);
    const Inputs before = state;
    Inputs after;
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const int64_t weights = (channel + e) * p.weight_stride;
      if (p.bias) y[e] = companion_at<T>(p.bias, p.wide_weight, (channel + e) * p.bias_stride);
#pragma unroll
      for (int l = 0; l < kLength; ++l) {
        y[e] += companion_at<T>(p.weight, p.wide_weight, weights + l) *
                widen(before.elements[e * kLength + l]);
        after.elements[e * kLength + l] =
            l + 1 < kLength ? before.elements[e * kLength + l + 1] : x.elements[e];
      }
      y[e] += companion_at<T>(p.weight, p.wide_weight, weights + kLength) * widen(x.elements[e]);
      if (p.silu) y[e] *= sigmoid(y[e]);
    }
    state = after;
  }
  store(y, static_cast<T*>(p.out) + row * p.channels + channel);
}

// A thread has a channel of a row.
template <class T>
__global__ void __launch_bounds__(kConvThreads) step_taps(const ConvStepParams p) {
  constexpr int kAtOnce = 8;
  const int64_t i = int64_t{blockIdx.x} * kConvThreads + threadIdx.x, row = i / p.channels;
  if (row >= p.rows) return;
  const int64_t channel = i % p.channels;
  const int64_t slot = slot_of(p.state_indices, row, p.slots);
  float y = 0.f;
  if (slot >= 0) {
    const T x = static_cast<const T*>(p.x)[row * p.x_stride + channel];
    T* const state = static_cast<T*>(p.state) + slot * p.state_stride + channel * p.state_length;
    const int64_t weights = channel * p.weight_stride;
    if (p.bias) y = companion_at<T>(p.bias, p.wide_weight, channel * p.bias_stride);
    for (int tap = 0; tap < p.taps - 1; ++tap) {
      y += companion_at<T>(p.weight, p.wide_weight, weights + tap) * widen(state[tap * p.dilation]);
    }
    y += companion_at<T>(p.weight, p.wide_weight, weights + p.taps - 1) * widen(x);
    if (p.silu) y *= sigmoid(y);
    for (int64_t l = 0; l < p.state_length; l += kAtOnce) {
      T next[kAtOnce];
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        next[n] = l + n + 1 < p.state_length ? state[l + n + 1] : x;
      }
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        if (l + n < p.state_length) state[l + n] = next[n];
      }
    }
  }
  narrow(y, static_cast<T*>(p.out)[row * p.channels + channel]);
}

}  // namespace memkernels::scan::cuda
