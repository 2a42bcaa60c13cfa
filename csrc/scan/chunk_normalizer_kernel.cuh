// What linear attention divides by: scale z . q + eps, z = exp(g) z + k, in float32 throughout.
// What the tokens of each chunk add to z, all chunks at once; z from chunk to chunk; and what its
// tokens read of it. Back likewise: the gradient of a divisor is -sum_v dout out over it.
//
// A block a chunk and value head. Cost: 4 K flops a token and head; q and k are read once more.
#pragma once

#include "scan/chunk_kernel.cuh"

namespace memkernels::scan::cuda {

inline constexpr int kNormalizerThreads = kMostKeys;

// Rows of q or k as they read or write, but for factors of tokens: Prepared::rows[which], or x.
template <class T, int kTokens>
__device__ __forceinline__ TokenRows rows_of(const ChunkParams& c, const TokenRows& x, int which,
                                             const ChunkOf& chunk, int head, int64_t unit) {
  if (!c.prepared.rows) {
    return {row_at<T>(x, chunk.batch, chunk.begin, head / c.group), 0, x.token_stride, 0};
  }
  const int64_t first = (unit * 3 + which) * kTokens * c.row;
  return {static_cast<const T*>(c.prepared.rows) + first, 0, c.row, 0};
}

// The sum of rows times factors, a thread a column.
template <class T>
__device__ __forceinline__ float sum_column(const TokenRows& rows, const float* factors,
                                            int count) {
  float sum = 0.f;
#pragma unroll 8
  for (int i = 0; i < count; ++i) {
    sum += widen(row_at<T>(rows, 0, i, 0)[threadIdx.x]) * factors[i];
  }
  return sum;
}

// What a chunk's tokens add to z, to zs.
template <class T, int kTokens>
__global__ void __launch_bounds__(kNormalizerThreads, 1) add_keys(const NormalizerParams p) {
  const ChunkParams& c = p.c;
  ChunkOf chunk;
  if (!find_chunk<kTokens>(c, blockIdx.x / c.heads, chunk)) return;
  const int head = static_cast<int>(blockIdx.x % c.heads), key = threadIdx.x;
  const int64_t unit = blockIdx.x;
  if (key >= c.keys) return;
  const float* const factors = c.prepared.factors + (unit * 4 + 2) * kTokens;
  const TokenRows keys = rows_of<T, kTokens>(c, c.k, 2, chunk, head, unit);
  p.zs[unit * c.key_row + key] = sum_column<T>(keys, factors, chunk.count);
}

// From these z before each chunk, or the gradient of z after it. A block a sequence and value head,
// a thread a channel.
template <int kTokens>
__global__ void __launch_bounds__(kNormalizerThreads, 1) walk_z(const ZWalkParams p) {
  const ChunkParams& c = p.c;
  const int64_t n = blockIdx.x / c.heads, head = blockIdx.x % c.heads;
  const int key = threadIdx.x;
  if (key >= c.keys) return;
  const Span span = span_of(c.sequences, n);
  const int64_t first = first_chunk<kTokens>(c, n);
  const int64_t chunks = (span.end - span.begin + kTokens - 1) / kTokens;
  float z = 0.f;
  if (p.initial_z.data) z = row_at<float>(p.initial_z, n, key, head)[0];
  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t number = first + (p.back ? chunks - 1 - i : i);
    const int64_t row = (number * c.heads + head) * c.key_row + key;
    const float added = p.zs[row];
    p.zs[row] = z;
    z = z * c.prepared.totals[row] + added;
  }
  if (p.z) p.z[(n * c.heads + head) * c.keys + key] = z;
}

template <class T, int kTokens>
__global__ void __launch_bounds__(kNormalizerThreads, 1)
    find_normalizers(const NormalizerParams p) {
  const ChunkParams& c = p.c;
  ChunkOf chunk;
  if (!find_chunk<kTokens>(c, blockIdx.x / c.heads, chunk)) return;
  const int head = static_cast<int>(blockIdx.x % c.heads), lane = threadIdx.x % 32;
  const int64_t unit = blockIdx.x;
  const TokenRows queries = rows_of<T, kTokens>(c, c.q, 0, chunk, head, unit);
  const float* const z = p.zs + unit * c.key_row;
  const T* const all_scores = static_cast<const T*>(c.prepared.scores) + unit * kTokens * kTokens;
  for (int i = threadIdx.x / 32; i < kTokens; i += kNormalizerThreads / 32) {
    float read = 0.f, scores = 0.f;
    if (i < chunk.count) {
      const T* const q = row_at<T>(queries, 0, i, 0);
      for (int k = lane; k < c.keys; k += 32) read += widen(q[k]) * z[k];
      for (int j = lane; j <= i; j += 32) scores += widen(all_scores[i * kTokens + j]);
    }
    float sum = read * c.prepared.factors[unit * 4 * kTokens + i] + scores;
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kWholeWarp, sum, lanes);
    if (lane == 0) p.inverse[unit * kTokens + i] = i < chunk.count ? 1.f / (sum + p.eps) : 0.f;
  }
}

// The gradients of what was divided by, and what a chunk's tokens add to that of z before it.
template <class T, int kTokens>
__global__ void __launch_bounds__(kNormalizerThreads, 1)
    find_dnormalizers(const NormalizerGradParams p) {
  const ChunkParams& c = p.c;
  ChunkOf chunk;
  if (!find_chunk<kTokens>(c, blockIdx.x / c.heads, chunk)) return;
  const int head = static_cast<int>(blockIdx.x % c.heads), tid = threadIdx.x, lane = tid % 32;
  const int64_t unit = blockIdx.x;
  float* const weights = reinterpret_cast<float*>(shared_memory());
  for (int i = tid / 32; i < chunk.count; i += kNormalizerThreads / 32) {
    const int64_t token = chunk.batch * c.sequences.tokens + chunk.begin + i;
    const int64_t row = (token * c.heads + head) * c.values;
    float sum = 0.f;
    for (int v = lane; v < c.values; v += 32) {
      sum += widen(static_cast<const T*>(p.dout)[row + v]) *
             widen(static_cast<const T*>(p.out)[row + v]);
    }
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kWholeWarp, sum, lanes);
    if (lane != 0) continue;
    const float dnormalizer = -sum * p.inverse[unit * kTokens + i];
    p.dnormalizers[unit * kTokens + i] = dnormalizer;
    weights[i] = dnormalizer * c.prepared.factors[unit * 4 * kTokens + i];
  }
  __syncthreads();
  if (tid >= c.keys) return;
  const TokenRows queries = rows_of<T, kTokens>(c, c.q, 0, chunk, head, unit);
  p.dzs[unit * c.key_row + tid] = sum_column<T>(queries, weights, chunk.count);
}

}  // namespace memkernels::scan::cuda
