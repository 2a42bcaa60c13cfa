// h = exp(delta A) h + delta u B; y = C . h + D u; out = y silu(z), of every channel and token.
//
// A thread has four states of a channel in registers, a block the tokens of some channels, part by
// part. A sequence is always computed by parts of 32 tokens: with l the states that a part's tokens
// leave where there were none before, h behind it is exp(A sum of delta) h + l. So parts give the
// same bits wherever they are computed: all by one block, which costs an FMA; or where there are
// too few sequences and channels to fill the GPU, each by one of its own, after a kernel that finds
// all l, and one that joins them.
//
// Cost of a state and token: an exponential, of which an H200 issues 16 a clock and multiprocessor,
// and 8 instructions, of which it issues 128; but of a channel and token another 130, half of them
// for gates and softplus. So 16 states of a million channels and tokens take 4 us of exponentials,
// 8 of instructions, and 2 of memory for 8 bytes in bfloat16: bound by instructions. Twice as much
// of both where cut.
#pragma once

#include <type_traits>

#include "scan/selective_scan_tiles.cuh"

namespace memkernels::scan::cuda {

// A part's rows as they came, in shared memory: u, delta and z [tokens, channels], B and C [tokens,
// slices, kSliceStates].
template <class T>
struct Stage {
  PartRows<T, int> u, delta, z, B, C;

  __host__ __device__ __forceinline__ static int elements(const ScanThreads& threads, bool gated) {
    return kScanPartTokens *
           ((gated ? 3 : 2) * threads.channels() + 2 * threads.slices * kSliceStates);
  }
  __device__ __forceinline__ Stage(T* memory, const ScanThreads& threads, bool gated)
      : u(memory, threads.channels()),
        delta(u.data + kScanPartTokens * u.stride, u.stride),
        z(gated ? delta.data + kScanPartTokens * u.stride : nullptr, u.stride),
        B((gated ? z : delta).data + kScanPartTokens * u.stride, threads.slices * kSliceStates),
        C(B.data + kScanPartTokens * B.stride, B.stride) {}
};

// Copies a sequence's rows to stages. A thread has one column of 16 bytes of one of the tensors,
// and every so many rows; there are never more columns than threads.
template <class T>
struct RowCopies {
  static constexpr int kChunk = 16 / sizeof(T);

  const T* from;  // of the next part
  int64_t stride;
  int to, pitch;  // elements within a stage, and from row to row
  int row, row_step;
  int left;  // of the row's elements, those from the column on
  bool aligned;

  __device__ __forceinline__ RowCopies(const SelectiveScanParams& p, const Place& place,
                                       const Span& span)
      : left(0) {
    const int channel_columns = p.threads.channels() / kChunk;
    const int group_pitch = p.threads.slices * kSliceStates, group_columns = group_pitch / kChunk;
    const int tensors = p.z.data ? 3 : 2;
    const int columns = tensors * channel_columns + 2 * group_columns;
    row = threadIdx.x / columns;
    row_step = p.threads.count() / columns;
    int column = threadIdx.x % columns, tensor = column / channel_columns;
    if (tensor < tensors) {
      column -= tensor * channel_columns;
      pitch = p.threads.channels();
      to = tensor * kScanPartTokens * pitch;
      left = place.count;
    } else {
      column -= tensors * channel_columns;
      tensor = 3 + column / group_columns;
      column %= group_columns;
      pitch = group_pitch;
      to = kScanPartTokens * (tensors * p.threads.channels() + (tensor - 3) * pitch);
      left = p.states;
    }
    const ScanRows& rows = tensor == 0   ? p.u
                           : tensor == 1 ? p.delta
                           : tensor == 2 ? p.z
                           : tensor == 3 ? p.B
                                         : p.C;
    stride = rows.strides[1];
    column *= kChunk;
    left = row < row_step ? left - column : 0;
    to += row * pitch + column;
    from = static_cast<const T*>(rows.data) + span.batch * rows.strides[0] +
           (span.begin + row) * stride +
           (tensor < 3 ? place.first : place.group * rows.strides[2]) + column;
    aligned = (reinterpret_cast<uintptr_t>(from) | stride * sizeof(T)) % 16 == 0;
  }

  // Starts copying the next part.
  __device__ __forceinline__ void start(T* stage, int tokens) {
    const T* source = from;
    T* place = stage + to;
    const int count = left < kChunk ? left : kChunk;
    for (int t = row; t < tokens && count > 0; t += row_step) {
      if (aligned) {
        copy_async_16(place, source, count * static_cast<int>(sizeof(T)));
      } else {
#pragma unroll 1
        for (int i = 0; i < count; ++i) place[i] = source[i];
      }
      source += row_step * stride;
      place += row_step * pitch;
    }
    from += kScanPartTokens * stride;
    commit_copies();
  }
};

// Sequences as a whole; or, of carries, parts.
template <class T>
__global__ void __launch_bounds__(kMostScanThreads, 1)
    scan_channels(const SelectiveScanParams p, int stages) {
  const int blocks = p.groups * p.threads.group_blocks;
  const int64_t n = blockIdx.x / blocks;  // a sequence, or a slot
  const ScanThread thread(p.threads);
  const Place place(p, thread, blockIdx.x % blocks);
  const Span span = p.carries ? tokens_of(p.parts, n) : span_of(p.parts.sequences, n);
  if (span.begin == span.end && p.carries) return;
  const int64_t size = int64_t{p.dim} * p.states;
  const ScanTile<ScanInput> tile(shared_memory(), p.threads);
  using Sums = ChannelNumbers<1, kScanPartTokens>;  // of C . h
  float* const sums = tile.end(p.threads);
  const auto staged = reinterpret_cast<T*>(sums + kScanPartTokens * p.threads.count());
  const bool gated = p.z.data;
  const int stage_size = Stage<T>::elements(p.threads, gated);
  RowCopies<T> copies(p, place, span);
  const auto tokens_from = [&](int64_t begin) {
    return static_cast<int>(clamp(span.end - begin, 0, kScanPartTokens));
  };

  float A[kLaneStates], before[kLaneStates];
  if (span.begin < span.end) copies.start(staged, tokens_from(span.begin));
  place.load_A(p, A);
  if (p.carries) {
    place.load(p.carries + n * size, p.states, p.states, before);
  } else {
    place.load(p.initial, n, p.states, before);
  }
  int current = 0;
  for (int64_t begin = span.begin; begin < span.end; begin += kScanPartTokens) {
    const int64_t next = begin + kScanPartTokens;
    const int tokens = tokens_from(begin);
    const Stage<T> rows(staged + current * stage_size, p.threads, gated);
    wait_copies<0>();
    __syncthreads();
    current = stages - 1 - current;
    if (stages == 2 && next < span.end) {
      copies.start(staged + current * stage_size, tokens_from(next));
    }
    fill_groups(p, thread, tile, rows.B, rows.C, tokens);
    fill_channels(p, place, tile, rows.u, rows.delta, rows.z, tokens);
    __syncthreads();

    float h[kLaneStates], left[kLaneStates], deltas = 0.f;
#pragma unroll
    for (int i = 0; i < kLaneStates; ++i) h[i] = before[i], left[i] = 0.f;
    const ScanInput* const inputs = tile.channel(place);
    const float* const groups = tile.states(place);
    float* const own_sums = Sums::own(sums);
#pragma unroll 4
    for (int t = 0; t < tokens; ++t) {
      const ScanInput input = inputs[t];
      const float x = input.delta * input.u;
      float B[kLaneStates], C[kLaneStates], y = 0.f;
      load(groups + t * tile.kGroupPitch, B);
      load(groups + t * tile.kGroupPitch + kSliceStates, C);
      deltas += input.delta;
#pragma unroll
      for (int i = 0; i < kLaneStates; ++i) {
        const float decay = exp2_fast(input.delta * A[i]), added = x * B[i];
        h[i] = fmaf(decay, h[i], added);
        left[i] = fmaf(decay, left[i], added);
        y = fmaf(h[i], C[i], y);
      }
      own_sums[t * 32] = y;
    }
#pragma unroll
    for (int i = 0; i < kLaneStates; ++i) before[i] = behind(A[i], deltas, before[i], left[i]);
    __syncthreads();

    const Share share = plain_share(p.threads, p.threads.channel_bits);
    if (share.column < place.count) {
      const int64_t channel = place.first + share.column;
      const float D = p.D ? p.D[channel] : 0.f;
      const Sums all_sums(sums, p.threads, share.column);
      PartColumn<T, int> gates(rows.z, share);
      T* out = static_cast<T*>(p.out) +
               (span.batch * p.parts.sequences.tokens + begin + share.row) * p.dim + channel;
      const int64_t out_step = int64_t{share.step} * p.dim;
      constexpr int kAhead = 2;
      for (int first = share.row; first < tokens; first += kAhead * share.step) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          const int t = first + i * share.step;
          if (t >= tokens) continue;
          float y[1];
          all_sums.add(y, t);
          if (p.D) y[0] += D * tile.inputs[share.column * tile.kPitch + t].u;
          if (gated) {
            const float gate = gates[i];
            y[0] *= gate * sigmoid(gate);
          }
          narrow(y[0], out[i * out_step]);
        }
        out += kAhead * out_step;
        if (gated) gates.advance(kAhead);
      }
    }
    if (stages == 1 && next < span.end) {
      __syncthreads();
      copies.start(staged, tokens_from(next));
    }
  }
  if (!p.carries && p.state) place.store(before, p.state + n * size, p.states);
}

// What the tokens of parts leave, and for the backward what they want of the states before, found
// backwards, as a product of all decays may be beyond all numbers where it meets no gradient.
template <class T, bool kBackward>
__global__ void __launch_bounds__(kMostScanThreads, 1) scan_parts(const SelectiveScanParams p) {
  const int blocks = p.groups * p.threads.group_blocks;
  const int64_t slot = blockIdx.x / blocks;
  const Span part = tokens_of(p.parts, slot);
  const int tokens = static_cast<int>(part.end - part.begin);
  if (tokens == 0) return;
  const ScanThread thread(p.threads);
  const Place place(p, thread, blockIdx.x % blocks);
  using Input = std::conditional_t<kBackward, ScanInputAndGrad, ScanInput>;
  const ScanTile<Input> tile(shared_memory(), p.threads);
  const auto rows = [&](const ScanRows& from) {
    return PartRows<T>(from, part.batch, part.begin, 0, place.first);
  };
  const auto group_rows = [&](const ScanRows& from) {
    return PartRows<T>(from, part.batch, part.begin, place.group, 0);
  };
  fill_groups(p, thread, tile, group_rows(p.B),
              kBackward ? group_rows(p.C) : PartRows<T>(nullptr, 0), tokens);
  fill_channels(p, place, tile, rows(p.u), rows(p.delta), rows(p.z), tokens, rows(p.dout));
  __syncthreads();

  float A[kLaneStates], left[kLaneStates] = {}, deltas = 0.f;
  place.load_A(p, A);
  const Input* const inputs = tile.channel(place);
  const float* const groups = tile.states(place);
#pragma unroll 4
  for (int t = 0; t < tokens; ++t) {
    const Input input = inputs[t];
    const float x = input.delta * input.u;
    float B[kLaneStates];
    load(groups + t * tile.kGroupPitch, B);
    deltas += input.delta;
#pragma unroll
    for (int i = 0; i < kLaneStates; ++i) {
      left[i] = fmaf(exp2_fast(input.delta * A[i]), left[i], x * B[i]);
    }
  }
  const int64_t offset = slot * p.dim * p.states;
  place.store(left, p.carries + offset, p.states);
  if (place.used() && place.state == 0) p.deltas[slot * p.dim + place.own_channel()] = deltas;
  if constexpr (kBackward) {
    float wanted[kLaneStates] = {};
#pragma unroll 4
    for (int t = tokens - 1; t >= 0; --t) {
      const Input input = inputs[t];
      float C[kLaneStates];
      load(groups + t * tile.kGroupPitch + kSliceStates, C);
#pragma unroll
      for (int i = 0; i < kLaneStates; ++i) {
        wanted[i] = exp2_fast(input.delta * A[i]) * fmaf(C[i], input.dy, wanted[i]);
      }
    }
    place.store(wanted, p.grads + offset, p.states);
  }
}

// From sequence to sequence and state to state, a thread each: in the place of what each part left
// what is before it; for both ways, by as many threads again from the last part to the first.
static __global__ void __launch_bounds__(kJoinThreads)
    join_parts(const SelectiveScanParams p, bool both) {
  const int64_t size = int64_t{p.dim} * p.states, all = p.parts.sequences.count * size;
  int64_t i = int64_t{blockIdx.x} * kJoinThreads + threadIdx.x;
  const bool backward = i >= all;
  if (backward) i -= all;
  if (i >= all || (backward && !both)) return;
  const int64_t n = i / size, element = i % size;
  const int64_t channel = element / p.states, s = element % p.states;
  const float A = to_base_2(p.A[channel * p.A_stride + s]);
  const StateRows& from = backward ? p.dstate : p.initial;
  float* const parts = backward ? p.grads : p.carries;
  float* const to = backward ? p.dinitial : p.state;
  float x = from.data ? from.data[n * from.strides[0] + channel * from.strides[1] + s] : 0.f;
  const Span span = span_of(p.parts.sequences, n);
  const int64_t slots = first_part(p.parts, n, span);
  const int64_t count = (span.end - span.begin + kScanPartTokens - 1) / kScanPartTokens;
  constexpr int kAhead = 8;
  for (int64_t first = 0; first < count; first += kAhead) {
    float left[kAhead] = {}, deltas[kAhead] = {};
    const auto slot_of = [&](int k) {
      return slots + (backward ? count - 1 - first - k : first + k);
    };
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (first + k >= count) continue;
      left[k] = parts[slot_of(k) * size + element];
      deltas[k] = p.deltas[slot_of(k) * p.dim + channel];
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (first + k >= count) continue;
      parts[slot_of(k) * size + element] = x;
      x = behind(A, deltas[k], x, left[k]);
    }
  }
  if (to) to[i] = x;
}

}  // namespace memkernels::scan::cuda
