// What the tokens of a chunk have to do with one another, with a decay of each channel:
//   score of a pair i > j = sum over channels of (q_i what reads) (k_j what writes)
// by halves of blocks, as chunk_channels.cuh has it, each half's pairs a matrix product; i = j
// needs no decay.
//
// A block a chunk and value head. Cost: 4 C K flops a token and head on tensor cores, the delta
// rule as much again, 3 log2(C) K beside them for rows that decay; bound by memory: 2 K gates and 8
// K bytes of rows a token, of 16 bits.
#pragma once

#include "scan/chunk_channels.cuh"
#include "scan/chunk_prepare_kernel.cuh"

namespace memkernels::scan::cuda {

inline constexpr int kDiagonalPitch = kBlock + 4;  // of blocks on the diagonal, a row a token

// Bytes of shared memory.
template <class T, int kTokens>
int64_t prepare_channels_bytes(const ChunkParams& p) {
  const int columns = pitch_of(p.keys * sizeof(T)) / sizeof(T);
  return (int64_t{7} * kTokens / 2) * pitch_of(p.keys * sizeof(T)) +
         sizeof(float) * (kTokens / kBlock * columns + kTokens * (kDiagonalPitch + 2));
}

template <class T, int kTokens>
__global__ void __launch_bounds__(kChannelThreads, 2) prepare_channel_chunks(const ChunkParams p) {
  constexpr int kDepth = 32 / sizeof(T), kWarps = kChannelThreads / 32;
  ChunkOf chunk;
  if (!find_chunk<kTokens>(p, blockIdx.x / p.heads, chunk)) return;
  const int head = blockIdx.x % p.heads, tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const bool delta = p.beta.rows.data != nullptr;
  const int steps = (p.keys + kDepth - 1) / kDepth, columns = steps * kDepth;

  char* const memory = shared_memory();
  const int pitch = pitch_of(p.keys * sizeof(T));
  const Tile q{memory, pitch}, k{q.data + kTokens * pitch, pitch};
  const HalfTiles halves{{k.data + kTokens * pitch, pitch}, {k.data + 2 * kTokens * pitch, pitch}};
  float* const diagonal = reinterpret_cast<float*>(halves.writes.data + kTokens / 2 * pitch);
  float* const erases = diagonal + kTokens * kDiagonalPitch;  // factors of k
  float* const norms = erases + kTokens;
  if (p.keys % kDepth != 0) {
    clear_memory(memory, 2 * kTokens * pitch);
    __syncthreads();
  }
  copy_rows<T>(q, kTokens, chunk.count, row_at<T>(p.q, chunk.batch, chunk.begin, head / p.group),
               p.q.token_stride, p.keys, p.qk_aligned);
  copy_rows<T>(k, kTokens, chunk.count, row_at<T>(p.k, chunk.batch, chunk.begin, head / p.group),
               p.k.token_stride, p.keys, p.qk_aligned);
  commit_copies();
  ChannelRun<kTokens> run(norms + kTokens, columns);
  run.template load<T>(p, chunk, head);
  if (tid < kTokens) {
    const bool erasing = delta && tid < chunk.count;
    erases[tid] = erasing ? -gate_at<T>(p.beta, chunk.batch, chunk.begin + tid, head) : 0.f;
  }
  wait_copies<0>();
  __syncthreads();
  if (p.qk_l2norm) {
    normalize_rows<T, kTokens>(norms, q, p.keys);
    normalize_rows<T, kTokens>(norms, k, p.keys);
    __syncthreads();
  }

  const int64_t unit = blockIdx.x;
  T* const scores = static_cast<T*>(p.prepared.scores) + unit * kTokens * kTokens;
  float* const solve = p.prepared.solve + (delta ? unit * kTokens * kTokens : 0);
  for (int i = tid; i < kTokens * kTokens; i += kChannelThreads) {
    if (i % kTokens <= i / kTokens) continue;
    narrow(0.f, scores[i]);
    if (delta) solve[i] = 0.f;
  }
  if (warp < kTokens / kBlock) {
    Sums<1, 2> sums;
    sums.clear();
    multiply_rows<T>(sums, q, warp * kBlock, k, warp * kBlock, steps);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int row = lane / 4 + e / 2 % 2 * 8, i = warp * kBlock + row;
      if (row != e / 4 * 8 + lane % 4 * 2 + e % 2) continue;
      narrow(sums.c[0][e / 4][e % 4] * p.scale, scores[i * kTokens + i]);
    }
  }

#pragma unroll
  for (int half = 1; half < kTokens; half *= 2) {
    run.template decay_rows<T>(halves, q, k, half, delta ? erases : nullptr);
    __syncthreads();
    const int blocks = half < 8 ? 1 : half / 8;  // of eight, in a half
    for (int product = warp; product < kTokens / 16 * blocks; product += kWarps) {
      const int readers = product / blocks, writers = readers / blocks * blocks + product % blocks;
      Sums<1, 1> sums;
      sums.clear();
      multiply_rows<T>(sums, halves.reads, 16 * readers, halves.writes, 8 * writers, steps);
      const int reader = 8 * readers + lane / 4, i = token_at_place(reader, half, true);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int writer = 8 * writers + lane % 4 * 2 + e, j = token_at_place(writer, half, false);
        if (i / (2 * half) != j / (2 * half)) continue;
        narrow(sums.c[0][0][e] * p.scale, scores[i * kTokens + j]);
        if (!delta) continue;
        const float key = sums.c[0][0][2 + e];
        (half < kBlock ? diagonal[i * kDiagonalPitch + j % kBlock] : solve[i * kTokens + j]) = key;
      }
    }
    __syncthreads();
  }

  T* const rows = static_cast<T*>(p.prepared.rows) + unit * 3 * kTokens * p.row;
  if (run.used && run.channel < p.row) {
    const auto write = [&](int which, const Tile& from, int i, const float (&product)[2]) {
      const int token = run.first + i;
      float x[2];
      load<T, 2>(from.element<T>(token, run.channel), x);
      store_pair(rows + (which * kTokens + token) * p.row + run.channel, x[0] * product[0],
                 x[1] * product[1]);
    };
    run.for_reads(kTokens, [&](int i, const float (&product)[2]) {
      write(0, q, i, product);
      if (delta) write(1, k, i, product);
      if (run.first + i + 1 < kTokens || run.channel >= p.key_row) return;
      float* const totals = p.prepared.totals + unit * p.key_row + run.channel;
      totals[0] = product[0], totals[1] = product[1];
    });
    run.for_writes(kTokens, [&](int i, const float (&product)[2]) { write(2, k, i, product); });
  }
  if (tid < kTokens) {
    float* const factors = p.prepared.factors + unit * 4 * kTokens + tid;
    factors[0] = p.scale;
    factors[kTokens] = erases[tid];
    factors[2 * kTokens] = 1.f;
    factors[3 * kTokens] = -erases[tid];
  }
  if (!delta) return;
  invert_blocks<kTokens>(diagonal, kDiagonalPitch, kBlock * kDiagonalPitch);
  __syncthreads();
  for (int i = tid; i < kTokens * kBlock; i += kChannelThreads) {
    const int row = i / kBlock;
    solve[row * kTokens + row / kBlock * kBlock + i % kBlock] =
        diagonal[row * kDiagonalPitch + i % kBlock];
  }
}

}  // namespace memkernels::scan::cuda
