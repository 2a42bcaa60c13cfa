// What linear attention divides by: scale z . q + eps, z = exp(g) z + k, in float32 throughout.
//
// A block a sequence and value head, a thread for each channel of z, a warp for each of the tokens
// that read it. Cost: 4 K flops a token and head; q and k are read once more.
#pragma once

#include "scan/chunk_kernel.cuh"

namespace memkernels::scan::cuda {

inline constexpr int kNormalizerThreads = kMostKeys;

template <class T, int kTokens>
__global__ void __launch_bounds__(kNormalizerThreads, 1)
    find_normalizers(const NormalizerParams p) {
  const ChunkParams& c = p.c;
  const int64_t n = blockIdx.x / c.heads;
  const int head = static_cast<int>(blockIdx.x % c.heads), shared = head / c.group;
  const int tid = threadIdx.x, lane = tid % 32;
  const Span span = span_of(c.sequences, n);
  const int64_t first = first_chunk<kTokens>(c, n);
  float* const z = reinterpret_cast<float*>(shared_memory());
  float own = 0.f;
  if (tid < c.keys && p.initial_z.data) {
    own = row_at<float>(p.initial_z, n, 0, head)[tid * p.initial_z.token_stride];
  }
  for (int64_t number = first; span.begin + (number - first) * kTokens < span.end; ++number) {
    const int64_t unit = number * c.heads + head, begin = span.begin + (number - first) * kTokens;
    const int count = static_cast<int>(clamp(span.end - begin, 0, kTokens));
    const float* const factors = c.prepared.factors + unit * 4 * kTokens;
    const T* const rows = static_cast<const T*>(c.prepared.rows) + unit * 3 * kTokens * c.row;
    const auto row_of = [&](const TokenRows& x, int which, int i) {
      return c.prepared.rows ? rows + (which * kTokens + i) * c.row
                             : row_at<T>(x, span.batch, begin + i, shared);
    };
    z[tid] = own;
    if (p.zs && tid < c.key_row) p.zs[unit * c.key_row + tid] = own;
    __syncthreads();
    for (int i = tid / 32; i < kTokens; i += kNormalizerThreads / 32) {
      if (i >= count) {
        if (lane == 0) p.inverse[unit * kTokens + i] = 0.f;
        continue;
      }
      const T* const q = row_of(c.q, 0, i);
      float read = 0.f, scores = 0.f;
      for (int k = lane; k < c.keys; k += 32) read += widen(q[k]) * z[k];
      for (int j = lane; j <= i; j += 32) {
        scores +=
            widen(static_cast<const T*>(c.prepared.scores)[(unit * kTokens + i) * kTokens + j]);
      }
      float sum = read * factors[i] + scores;
      for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kWholeWarp, sum, lanes);
      if (lane == 0) p.inverse[unit * kTokens + i] = 1.f / (sum + p.eps);
    }
    if (tid < c.keys) {
      own *= c.prepared.totals[unit * c.key_row + tid];
      for (int i = 0; i < count; ++i) {
        own += widen(row_of(c.k, 2, i)[tid]) * factors[2 * kTokens + i];
      }
    }
    __syncthreads();
  }
  if (p.z && tid < c.keys) p.z[(n * c.heads + head) * c.keys + tid] = own;
}

// The gradients of what was divided by, -sum_v dout out / it, and what a chunk's tokens add to that
// of z before it. A block a chunk and value head.
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
  const T* const rows = c.prepared.rows
                            ? static_cast<const T*>(c.prepared.rows) + unit * 3 * kTokens * c.row
                            : row_at<T>(c.q, chunk.batch, chunk.begin, head / c.group);
  const int64_t stride = c.prepared.rows ? c.row : c.q.token_stride;
  float sum = 0.f;
#pragma unroll 8
  for (int i = 0; i < chunk.count; ++i) sum += widen(rows[i * stride + tid]) * weights[i];
  p.dzs[unit * c.key_row + tid] = sum;
}

// From these the gradients of z after each chunk, which decays as z does. A block a sequence and
// value head, a thread a channel.
template <int kTokens>
__global__ void __launch_bounds__(kNormalizerThreads, 1) walk_dz(const NormalizerGradParams p) {
  const ChunkParams& c = p.c;
  const int64_t n = blockIdx.x / c.heads, head = blockIdx.x % c.heads;
  const int key = threadIdx.x;
  if (key >= c.keys) return;
  const Span span = span_of(c.sequences, n);
  const int64_t first = first_chunk<kTokens>(c, n), at = (n * c.heads + head) * c.keys + key;
  float dz = p.dz ? p.dz[at] : 0.f;
  for (int64_t i = (span.end - span.begin + kTokens - 1) / kTokens - 1; i >= 0; --i) {
    const int64_t row = ((first + i) * c.heads + head) * c.key_row + key;
    const float added = p.dzs[row];
    p.dzs[row] = dz;
    dz = dz * c.prepared.totals[row] + added;
  }
  if (p.dinitial_z) p.dinitial_z[at] = dz;
}

}  // namespace memkernels::scan::cuda
