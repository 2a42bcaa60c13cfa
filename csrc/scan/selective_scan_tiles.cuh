// How the CUDA kernels of selective_scan share the work: sequences by parts of 32 tokens, channels
// by blocks, states by threads; and a part in shared memory.
#pragma once

#include "scan/selective_scan.cuh"

namespace memkernels::scan::cuda {

// ---- parts ----

// The tokens of a part; none in a slot that is not used.
__device__ __forceinline__ Span tokens_of(const PartParams& parts, int64_t slot) {
  const Part part = part_at(parts, slot);
  const Span& all = part.span;
  const int64_t begin = clamp(all.begin + part.begin, 0, all.end);
  return {all.batch, begin, clamp(begin + kScanPartTokens, 0, all.end)};
}

// ---- channels, states and tiles of a block ----

// Where a thread is in its block, and which share of tiles is its own when all threads fill them.
struct ScanThread {
  int lane, slice, channel_warp;

  __device__ __forceinline__ explicit ScanThread(const ScanThreads& threads)
      : lane(threadIdx.x % 32),
        slice(threadIdx.x / 32 % threads.slices),
        channel_warp(threadIdx.x / 32 / threads.slices) {}
};
struct Share {
  int column, row, step;
};
// Of tiles of 1 << bits columns.
__device__ __forceinline__ Share plain_share(const ScanThreads& threads, int bits) {
  const int thread = threadIdx.x;
  return {thread & ((1 << bits) - 1), thread >> bits, threads.count() >> bits};
}
// Of tiles of 1 << bits columns for each slice.
__device__ __forceinline__ Share slice_share(const ScanThreads& threads, const ScanThread& thread,
                                             int bits) {
  return {thread.slice << bits | (thread.lane & ((1 << bits) - 1)),
          thread.channel_warp << (5 - bits) | thread.lane >> bits,
          threads.channel_warps << (5 - bits)};
}

struct Place {
  int group, count;    // of channels
  int64_t first;       // channel
  int channel, state;  // of the thread: of those channels, and the first of its states

  __device__ __forceinline__ Place(const SelectiveScanParams& p, const ScanThread& thread,
                                   int block) {
    const ScanThreads& threads = p.threads;
    const int offset = block % threads.group_blocks << threads.channel_bits;
    const int left = p.group_size - offset, bits = threads.lane_bits;
    group = block / threads.group_blocks;
    count = left < threads.channels() ? left : threads.channels();
    first = int64_t{group} * p.group_size + offset;
    channel = thread.channel_warp << (5 - bits) | thread.lane >> bits;
    state = thread.slice * kSliceStates + (thread.lane & ((1 << bits) - 1)) * kLaneStates;
  }
  __device__ __forceinline__ bool used() const { return channel < count; }
  __device__ __forceinline__ int64_t own_channel() const { return first + channel; }

  // The thread's states in [D, S], of a sequence or part; zeros where it has none.
  __device__ __forceinline__ void load(const float* of, int64_t stride, int states,
                                       float (&x)[kLaneStates]) const {
    if (of && used()) {
      load_states(of + own_channel() * stride, state, states, x);
    } else {
#pragma unroll
      for (int i = 0; i < kLaneStates; ++i) x[i] = 0.f;
    }
  }
  __device__ __forceinline__ void store(const float (&x)[kLaneStates], float* of,
                                        int states) const {
    if (used()) store_states(x, of + own_channel() * states, state, states);
  }
  __device__ __forceinline__ void load_A(const SelectiveScanParams& p,
                                         float (&A)[kLaneStates]) const {
    load(p.A, p.A_stride, p.states, A);
#pragma unroll
    for (int i = 0; i < kLaneStates; ++i) A[i] = to_base_2(A[i]);
  }
  __device__ __forceinline__ void load(const StateRows& rows, int64_t n, int states,
                                       float (&x)[kLaneStates]) const {
    load(rows.data ? rows.data + n * rows.strides[0] : nullptr, rows.strides[1], states, x);
  }
};

// A part's rows of one tensor, at a block's columns; Stride is int where they are staged.
template <class T, class Stride = int64_t>
struct PartRows {
  const T* data;  // null: absent
  Stride stride;

  __device__ __forceinline__ PartRows(const T* data, Stride stride) : data(data), stride(stride) {}
  __device__ __forceinline__ PartRows(const ScanRows& rows, int64_t batch, int64_t token,
                                      int64_t group, int64_t column)
      : data(static_cast<const T*>(rows.data)), stride(rows.strides[1]) {
    if (data) data += batch * rows.strides[0] + token * stride + group * rows.strides[2] + column;
  }
};

// What of them is a thread's.
template <class T, class Stride>
struct PartColumn {
  const T* from;
  Stride step;

  __device__ __forceinline__ PartColumn(const PartRows<T, Stride>& rows, const Share& share)
      : from(rows.data), step(share.step * rows.stride) {
    if (from) from += share.row * rows.stride + share.column;
  }
  __device__ __forceinline__ float operator[](int i) const { return widen(from[i * step]); }
  __device__ __forceinline__ void advance(int rows) { from += rows * step; }
};

struct alignas(8) ScanInput {
  float delta, u;
};
struct alignas(16) ScanInputAndGrad {
  float delta, u;
  float dy, dz;  // dz: for a y of 1
};

// A part as it is computed with, in shared memory.
template <class Input>
struct ScanTile {
  static constexpr int kPitch = kScanPartTokens + 1;    // so that channels lie in different banks
  static constexpr int kGroupPitch = 2 * kSliceStates;  // from token to token
  Input* inputs;                                        // [channels, kPitch]
  float* groups;                                        // [slices, tokens, 2, kSliceStates]: B, C

  static int bytes(const ScanThreads& threads) {
    return threads.channels() * kPitch * static_cast<int>(sizeof(Input)) +
           threads.slices * kScanPartTokens * kGroupPitch * static_cast<int>(sizeof(float));
  }
  __device__ __forceinline__ ScanTile(char* memory, const ScanThreads& threads)
      : inputs(reinterpret_cast<Input*>(memory)),
        groups(reinterpret_cast<float*>(inputs + threads.channels() * kPitch)) {}
  __device__ __forceinline__ float* end(const ScanThreads& threads) const {
    return groups + threads.slices * kScanPartTokens * kGroupPitch;
  }

  // Of a thread: its channel, and B of its states, C kSliceStates behind; by token.
  __device__ __forceinline__ const Input* channel(const Place& place) const {
    return inputs + place.channel * kPitch;
  }
  __device__ __forceinline__ const float* states(const Place& place) const {
    const int slice = place.state / kSliceStates, state = place.state % kSliceStates;
    return groups + slice * kScanPartTokens * kGroupPitch + state;
  }
};

template <class Input, class T, class Stride>
__device__ __forceinline__ void fill_groups(const SelectiveScanParams& p, const ScanThread& thread,
                                            const ScanTile<Input>& tile,
                                            const PartRows<T, Stride>& B,
                                            const PartRows<T, Stride>& C, int tokens) {
  constexpr int kPitch = ScanTile<Input>::kGroupPitch, kAhead = 4;
  const Share share = slice_share(p.threads, thread, 4);
  const bool used = share.column < p.states;
  PartColumn<T, Stride> b(B, share), c(C, share);
  float* to = tile.groups + (thread.slice * kScanPartTokens + share.row) * kPitch +
              share.column % kSliceStates;
  for (int first = share.row; first < tokens; first += kAhead * share.step) {
    float x[kAhead] = {}, y[kAhead] = {};
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (!used || first + i * share.step >= tokens) continue;
      x[i] = b[i];
      if (c.from) y[i] = c[i];
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i * share.step >= tokens) continue;
      to[i * share.step * kPitch] = x[i];
      to[i * share.step * kPitch + kSliceStates] = y[i];
    }
    to += kAhead * share.step * kPitch;
    b.advance(kAhead);
    if (c.from) c.advance(kAhead);
  }
}

template <class Input, class T, class Stride>
__device__ __forceinline__ void fill_channels(const SelectiveScanParams& p, const Place& place,
                                              const ScanTile<Input>& tile,
                                              const PartRows<T, Stride>& u,
                                              const PartRows<T, Stride>& delta,
                                              const PartRows<T, Stride>& z, int tokens,
                                              const PartRows<T, Stride>& dout = {nullptr, 0}) {
  constexpr bool kBackward = sizeof(Input) > sizeof(ScanInput);
  constexpr int kAhead = 4;
  const Share share = plain_share(p.threads, p.threads.channel_bits);
  const bool used = share.column < place.count, gated = kBackward && z.data;
  const float bias = p.bias && used ? p.bias[place.first + share.column] : 0.f;
  PartColumn<T, Stride> inputs_u(u, share), inputs_delta(delta, share), inputs_z(z, share),
      inputs_dout(dout, share);
  Input* to = tile.inputs + share.column * tile.kPitch + share.row;
  for (int first = share.row; first < tokens; first += kAhead * share.step) {
    Input inputs[kAhead] = {};
    float gates[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (!used || first + i * share.step >= tokens) continue;
      inputs[i].u = inputs_u[i];
      inputs[i].delta = inputs_delta[i];
      if constexpr (kBackward) inputs[i].dy = inputs_dout[i];
      if (gated) gates[i] = inputs_z[i];
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i * share.step >= tokens) continue;
      Input& input = inputs[i];
      if (used) {
        input.delta += bias;
        if (p.softplus) input.delta = softplus(input.delta);
        if constexpr (kBackward) {
          if (gated) {
            const float gate = gates[i], open = sigmoid(gate);
            input.dz = input.dy * open * (1.f + gate * (1.f - open));
            input.dy *= gate * open;
          }
        }
      }
      to[i * share.step] = input;
    }
    to += kAhead * share.step;
    inputs_u.advance(kAhead);
    inputs_delta.advance(kAhead);
    if constexpr (kBackward) {
      inputs_dout.advance(kAhead);
      if (gated) inputs_z.advance(kAhead);
    }
  }
}

// Numbers that threads have for others of their channel, [warps, arrays, items, lanes].
template <int kArrays, int kItems>
struct ChannelNumbers {
  __device__ __forceinline__ static float* own(float* numbers) {
    return numbers + threadIdx.x / 32 * kArrays * kItems * 32 + threadIdx.x % 32;
  }

  // To be added up.
  const float* data;
  int lane_bits, slices;

  __device__ __forceinline__ ChannelNumbers(const float* numbers, const ScanThreads& threads,
                                            int channel)
      : lane_bits(threads.lane_bits), slices(threads.slices) {
    const int warp = (channel >> (5 - lane_bits)) * slices;
    data = numbers + warp * kArrays * kItems * 32 + ((channel << lane_bits) & 31);
  }
  __device__ __forceinline__ void add(float (&sums)[kArrays], int item) const {
    const float* from = data + item * 32;
#pragma unroll
    for (int a = 0; a < kArrays; ++a) sums[a] = of_slice(from + a * kItems * 32);
#pragma unroll 1
    for (int slice = 1; slice < slices; ++slice) {
      from += kArrays * kItems * 32;
#pragma unroll
      for (int a = 0; a < kArrays; ++a) sums[a] += of_slice(from + a * kItems * 32);
    }
  }
  __device__ __forceinline__ float of_slice(const float* x) const {
    if (lane_bits < 2) return lane_bits > 0 ? x[0] + x[1] : x[0];
    float four[4];
    load(x, four);
    return (four[0] + four[1]) + (four[2] + four[3]);
  }
};

}  // namespace memkernels::scan::cuda
