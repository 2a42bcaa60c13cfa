// With a = exp(delta A) and h of the tokens before and after, backwards in time:
//   dy = dout silu(z), dz = dout y silu'(z), dD += dy u, dC = sum over channels of dy h,
//   dh += C dy, dB = sum over channels of dh delta u, du = D dy + delta (B . dh),
//   dA += delta dh a h', ddelta = u (B . dh) + A . (dh a h'), and dh a is what h' gets.
//
// All parts of 32 tokens at once: one kernel has found what each leaves of states, and wants of
// those before it, and another has joined them (selective_scan_kernel.cuh). Here a block goes
// through a part and some blocks of channels: once forward, to have the states at every eighth
// token, then eight tokens after eight back to the beginning, whose decays and states are computed
// anew and stay in registers. What a part adds to gradients of weights, and a block to those of B
// and C, lies apart, to be added up in its order.
//
// Cost of a state and token: four exponentials and 37 instructions in all, and of a channel and
// token another 300. So 16 states of a million channels and tokens take 31 us of instructions, 16
// of exponentials, and in bfloat16 10 of memory: inputs twice, gradients, and 20 bytes of what lies
// apart. Bound by instructions.
//
// What lies apart: of each part, of which there are at most T / 32 and one a sequence, 8 S + 4
// bytes a channel, and 4 for dD; and 4 S of each token and group, for dB and dC each, from every
// run of blocks of channels, up to 16 of them. The former are moved 5 times, of full parts 1.25 S
// bytes a channel and token in all.
#pragma once

#include "scan/part_sums.cuh"
#include "scan/selective_scan_kernel.cuh"

namespace memkernels::scan::cuda {

// What threads have of eight tokens: C . h, B . dh, A . (dh a h').
using AgainNumbers = ChannelNumbers<3, kAgainTokens>;
// Of two tokens, a thread's four numbers of dB lie at four times its lane, those of dC behind them,
// in other banks.
inline constexpr int kTurnedC = 128 + 16, kTurned = 2 * kTurnedC, kTurnedTokens = 2;

struct BackwardMemory {
  using Tile = ScanTile<ScanInputAndGrad>;
  static constexpr int kStarts = kScanPartTokens / kAgainTokens - 1;

  Tile tile;
  float* numbers;  // AgainNumbers
  float* starts;   // [kStarts, threads, kLaneStates]
  float* turned;   // [warps, kTurnedTokens, kTurned]
  float* groups;   // [shares, slices, kAgainTokens, 2, kSliceStates]: dB, dC

  // Four channels each, that are added up by themselves.
  __host__ __device__ __forceinline__ static int shares(const ScanThreads& threads) {
    return threads.channel_warps << (3 - threads.lane_bits);
  }
  static int bytes(const ScanThreads& threads) {
    const int of_thread = 3 * kAgainTokens + kStarts * kLaneStates;
    const int of_warp = 32 * of_thread + kTurnedTokens * kTurned;
    const int of_share = threads.slices * kAgainTokens * Tile::kGroupPitch;
    return Tile::bytes(threads) + (threads.count() / 32 * of_warp + shares(threads) * of_share) *
                                      static_cast<int>(sizeof(float));
  }
  __device__ __forceinline__ BackwardMemory(char* memory, const ScanThreads& threads)
      : tile(memory, threads),
        numbers(tile.end(threads)),
        starts(numbers + 3 * kAgainTokens * threads.count()),
        turned(starts + kStarts * kLaneStates * threads.count()),
        groups(turned + threads.count() / 32 * kTurnedTokens * kTurned) {}
};

// A thread on its way through a part.
struct ScanBackward {
  static constexpr int N = kLaneStates;

  const SelectiveScanParams& p;
  const BackwardMemory& m;
  // Of the thread.
  const ScanInputAndGrad* inputs;  // [tokens]
  const float* groups;             // [tokens, 2, kSliceStates]
  float* numbers;                  // [3, kAgainTokens, lanes]
  float* turned_to;                // [kTurnedTokens, kTurned]
  // Of a token, either gradient, four of the slice's states and four channels it adds up.
  const float* turned_from;
  float* sums;  // [kAgainTokens, 2 kSliceStates]
  float A[N], dh[N], dA[N];

  __device__ __forceinline__ ScanBackward(const SelectiveScanParams& p, const BackwardMemory& m,
                                          const ScanThread& thread, const Place& place)
      : p(p), m(m), inputs(m.tile.channel(place)), groups(m.tile.states(place)) {
    const int warp = threadIdx.x / 32, bits = p.threads.lane_bits, lanes = 1 << bits;
    numbers = AgainNumbers::own(m.numbers);
    float* const turned = m.turned + warp * kTurnedTokens * kTurned;
    turned_to = turned + thread.lane * N;
    const int token = thread.lane >> 4, share = (thread.lane & 15) >> (bits + 1);
    const bool is_C = thread.lane & lanes;
    const int states = (thread.lane & (lanes - 1)) * N;
    turned_from =
        turned + token * kTurned + (is_C ? kTurnedC : 0) + (share * 4 * N << bits) + states;
    const int all_shares = thread.channel_warp << (3 - bits) | share;
    sums =
        m.groups +
        ((all_shares * p.threads.slices + thread.slice) * kAgainTokens + token) * 2 * kSliceStates +
        (is_C ? kSliceStates : 0) + states;
  }

  __device__ __forceinline__ static void load_group(const float* from, int t, float (&x)[N]) {
    load(from + t * BackwardMemory::Tile::kGroupPitch, x);
  }
  __device__ __forceinline__ float* start(int again) const {
    return m.starts + ((again - 1) * p.threads.count() + threadIdx.x) * N;
  }

  // The states at every eighth token but the first.
  __device__ __forceinline__ void forward(float (&h)[N], int tokens) const {
#pragma unroll 1
    for (int begin = 0; begin + kAgainTokens < tokens; begin += kAgainTokens) {
#pragma unroll 4
      for (int t = begin; t < begin + kAgainTokens; ++t) {
        const float delta = inputs[t].delta, x = delta * inputs[t].u;
        float B[N];
        load_group(groups, t, B);
#pragma unroll
        for (int k = 0; k < N; ++k) h[k] = exp2_fast(delta * A[k]) * h[k] + x * B[k];
      }
      store(h, start(begin / kAgainTokens + 1));
    }
  }

  // Eight tokens from `begin` on, or `tokens` of them.
  template <bool kWhole>
  __device__ __forceinline__ void back(const float (&before)[N], int begin, int tokens) {
    const ScanInputAndGrad* const in = inputs + begin;
    const float* const B_and_C = groups + begin * BackwardMemory::Tile::kGroupPitch;
    float decays[kAgainTokens][N], h[kAgainTokens][N];
#pragma unroll
    for (int i = 0; i < kAgainTokens; ++i) {
      if (!kWhole && i >= tokens) continue;
      const float delta = in[i].delta, x = delta * in[i].u;
      float B[N], C[N], y = 0.f;
      load_group(B_and_C, i, B);
      load_group(B_and_C + kSliceStates, i, C);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        decays[i][k] = exp2_fast(delta * A[k]);
        h[i][k] = decays[i][k] * (i > 0 ? h[i > 0 ? i - 1 : 0][k] : before[k]) + x * B[k];
        y += h[i][k] * C[k];
      }
      numbers[i * 32] = y;
    }
#pragma unroll
    for (int i = kAgainTokens - 1; i >= 0; --i) {
      if (!kWhole && i >= tokens) continue;
      const ScanInputAndGrad input = in[i];
      const float x = input.delta * input.u;
      float B[N], C[N], along_B = 0.f, along_A = 0.f;
      load_group(B_and_C, i, B);
      load_group(B_and_C + kSliceStates, i, C);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const float dnext = dh[k] + input.dy * C[k];
        along_B += dnext * B[k];
        dh[k] = dnext * decays[i][k];
        const float dpower = dh[k] * (i > 0 ? h[i > 0 ? i - 1 : 0][k] : before[k]);
        dA[k] += dpower * input.delta;
        // A of -inf decays to an exact 0, which nothing can change.
        along_A += dpower * fmaxf(A[k], -kGreatest);
        B[k] = dnext * x;
        C[k] = input.dy * h[i][k];
      }
      numbers[(kAgainTokens + i) * 32] = along_B;
      numbers[(2 * kAgainTokens + i) * 32] = along_A;
      if (p.dB || p.dC) add_channels(B, C, i);
    }
  }

  // Puts aside what there is of dB and dC of token i, and after every other token adds up.
  __device__ __forceinline__ void add_channels(const float (&dB)[N], const float (&dC)[N],
                                               int i) const {
    store(dB, turned_to + i % kTurnedTokens * kTurned);
    store(dC, turned_to + i % kTurnedTokens * kTurned + kTurnedC);
    if (i % kTurnedTokens > 0) return;
    __syncwarp();
    float x[4][N];
#pragma unroll
    for (int channel = 0; channel < 4; ++channel) {
      load(turned_from + (channel * N << p.threads.lane_bits), x[channel]);
    }
#pragma unroll
    for (int k = 0; k < N; ++k) x[0][k] = (x[0][k] + x[1][k]) + (x[2][k] + x[3][k]);
    store(x[0], sums + i * 2 * kSliceStates);
    __syncwarp();
  }
};

// What a block has of those eight tokens, put together. row: of the first in [B T].
__device__ __forceinline__ void finish_groups(const SelectiveScanParams& p, const BackwardMemory& m,
                                              const ScanThread& thread, int group, int run,
                                              int64_t row, int tokens, bool first) {
  const int columns = 2 * kSliceStates, share_size = p.threads.slices * kAgainTokens * columns;
  const Share share = slice_share(p.threads, thread, 5);
  float* const all_runs = share.column & kSliceStates ? p.dC : p.dB;
  const int s = thread.slice * kSliceStates + share.column % kSliceStates;
  if (!all_runs || s >= p.states) return;
  const float* const from =
      m.groups + thread.slice * kAgainTokens * columns + share.column % columns;
  float* const to =
      all_runs + run * p.rows * p.groups * p.states + (row * p.groups + group) * p.states + s;
#pragma unroll 1
  for (int i = share.row; i < tokens; i += share.step) {
    float sum = 0.f;
#pragma unroll 4
    for (int k = 0; k < BackwardMemory::shares(p.threads); ++k) {
      sum += from[k * share_size + i * columns];
    }
    float& all = to[int64_t{i} * p.groups * p.states];
    all = first ? sum : all + sum;
  }
}

// The same of channels; adds to dD and dbias of the thread's column.
template <class T>
__device__ __forceinline__ void finish_channels(const SelectiveScanParams& p,
                                                const BackwardMemory& m, const Place& place,
                                                int64_t row, int begin, int tokens, float& dD,
                                                float& dbias) {
  const Share share = plain_share(p.threads, p.threads.channel_bits);
  if (share.column >= place.count) return;
  const int64_t channel = place.first + share.column;
  const float D = p.D ? p.D[channel] : 0.f;
  const AgainNumbers numbers(m.numbers, p.threads, share.column);
#pragma unroll 1
  for (int i = share.row; i < tokens; i += share.step) {
    const ScanInputAndGrad in = m.tile.inputs[share.column * m.tile.kPitch + begin + i];
    float sums[3];
    numbers.add(sums, i);
    const float along_B = sums[1], along_A = kLn2 * sums[2];
    const int64_t to = (row + i) * p.dim + channel;
    float ddelta = in.u * along_B + along_A;
    if (p.softplus) ddelta *= -expm1f(-in.delta);
    dD += in.dy * in.u;
    dbias += ddelta;
    if (p.du) {
      float du = in.delta * along_B;
      if (p.D) du += D * in.dy;
      narrow(du, static_cast<T*>(p.du)[to]);
    }
    if (p.ddelta) narrow(ddelta, static_cast<T*>(p.ddelta)[to]);
    if (p.dz) {
      float y = sums[0];
      if (p.D) y += D * in.u;
      narrow(in.dz * y, static_cast<T*>(p.dz)[to]);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kMostScanThreads, 1) scan_backward(const SelectiveScanParams p) {
  const int run = blockIdx.x % p.runs, group = blockIdx.x / p.runs % p.groups;
  const int64_t slot = blockIdx.x / p.runs / p.groups;
  const Span part = tokens_of(p.parts, slot);
  const int tokens = static_cast<int>(part.end - part.begin);
  const int64_t blocks = p.threads.group_blocks;
  const int first = static_cast<int>(run * blocks / p.runs);
  const int last = static_cast<int>((run + 1) * blocks / p.runs);
  const BackwardMemory m(shared_memory(), p.threads);
  const ScanThread thread(p.threads);
  {
    const auto rows = [&](const ScanRows& from) {
      return PartRows<T>(from, part.batch, part.begin, group, 0);
    };
    fill_groups(p, thread, m.tile, rows(p.B), rows(p.C), tokens);
  }
  for (int block = first; block < last; ++block) {
    const Place place(p, thread, group * p.threads.group_blocks + block);
    const auto rows = [&](const ScanRows& from) {
      return PartRows<T>(from, part.batch, part.begin, 0, place.first);
    };
    fill_channels(p, place, m.tile, rows(p.u), rows(p.delta), rows(p.z), tokens, rows(p.dout));
    __syncthreads();

    float* const carries = p.carries + slot * p.dim * p.states;
    float h[kLaneStates], dD = 0.f, dbias = 0.f;
    ScanBackward scan(p, m, thread, place);
    place.load_A(p, scan.A);
#pragma unroll
    for (int k = 0; k < kLaneStates; ++k) scan.dA[k] = 0.f;
    if (tokens > 0) {
      place.load(p.grads + slot * p.dim * p.states, p.states, p.states, scan.dh);
      place.load(carries, p.states, p.states, h);
      scan.forward(h, tokens);
    }
#pragma unroll 1
    for (int begin = (tokens - 1) & -kAgainTokens; begin >= 0; begin -= kAgainTokens) {
      const int64_t row = part.batch * p.parts.sequences.tokens + part.begin + begin;
      const int left = tokens - begin < kAgainTokens ? tokens - begin : kAgainTokens;
      if (begin > 0) {
        load(scan.start(begin / kAgainTokens), h);
      } else {
        place.load(carries, p.states, p.states, h);
      }
      if (left == kAgainTokens) {
        scan.back<true>(h, begin, left);
      } else {
        scan.back<false>(h, begin, left);
      }
      __syncthreads();
      finish_groups(p, m, thread, group, run, row, left, block == first);
      finish_channels<T>(p, m, place, row, begin, left, dD, dbias);
      __syncthreads();
    }

    // Nobody needs the states before the part any more, nor the sums of delta.
    if (p.wants_dA) place.store(scan.dA, carries, p.states);
    if (p.wants_dD || p.wants_dbias) {
      float *const all_dD = m.numbers, *const all_dbias = all_dD + p.threads.count();
      all_dD[threadIdx.x] = dD;
      all_dbias[threadIdx.x] = dbias;
      __syncthreads();
      const Share share = plain_share(p.threads, p.threads.channel_bits);
      if (share.row == 0 && share.column < place.count) {
        float sums[2] = {};
        for (int i = share.column; i < p.threads.count(); i += p.threads.channels()) {
          sums[0] += all_dD[i];
          sums[1] += all_dbias[i];
        }
        const int64_t to = slot * p.dim + place.first + share.column;
        if (p.wants_dD) p.dD[to] = sums[0];
        if (p.wants_dbias) p.deltas[to] = sums[1];
      }
    }
  }
}

template <class To>
__global__ void __launch_bounds__(kAddThreads)
    add_scan_parts(const float* parts, int64_t num_parts, int64_t numbers, void* to) {
  const int64_t i = int64_t{blockIdx.x} * 32 + threadIdx.x % 32;
  const float sum = sum_of_parts(parts, num_parts, numbers, i);
  if (threadIdx.x < 32 && i < numbers) narrow(sum, static_cast<To*>(to)[i]);
}

}  // namespace memkernels::scan::cuda
