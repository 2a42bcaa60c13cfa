// What the tokens of a chunk have to do with one another, whatever the state and V; names as in
// chunk_cpu.h, of whose products of decays this makes the same use.
//
// A block a chunk and value head, a warp for 16 rows of scores. Cost: 4 C K flops a token and head.
#pragma once

#include "core/cuda/chunk.cuh"
#include "scan/chunk_kernel.cuh"

namespace memkernels::scan::cuda {

template <int kTokens>
struct PrepareShape {
  static constexpr int kThreads = 2 * kTokens;
  static constexpr int kPitch = kTokens + 8;  // of squares, so that rows lie in different banks
};

// Bytes of shared memory.
template <class T, int kTokens>
int64_t prepare_bytes(const ChunkParams& p) {
  return int64_t{2} * kTokens * pitch_of(p.keys * sizeof(T)) +
         sizeof(float) * kTokens * (2 * PrepareShape<kTokens>::kPitch + 4);
}

// Rows over their norms; zeros follow in the last 16 bytes of each.
template <class T, int kTokens>
__device__ __forceinline__ void normalize_rows(float* norms, const Tile& x, int dim) {
  constexpr int kElements = 16 / sizeof(T), kLanes = 8;
  const int lane = threadIdx.x % kLanes;
  for (int i = threadIdx.x / kLanes; i < kTokens; i += blockDim.x / kLanes) {
    float row[kElements], sum = 0.f;
    for (int c = lane * kElements; c < dim; c += kLanes * kElements) {
      load(x.element<T>(i, c), row);
#pragma unroll
      for (int e = 0; e < kElements; ++e) sum += row[e] * row[e];
    }
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
      sum += __shfl_xor_sync(kWholeWarp, sum, lanes);
    }
    const float norm = 1.f / sqrtf(sum + 1e-6f);
    for (int c = lane * kElements; c < dim; c += kLanes * kElements) {
      T* const to = x.element<T>(i, c);
      load(to, row);
#pragma unroll
      for (int e = 0; e < kElements; ++e) row[e] *= norm;
      store(row, to);
    }
    if (lane == 0) norms[i] = norm;
  }
}

// The decays of a chunk's tokens: exp(g), or 1.
template <class T, int kTokens>
__device__ __forceinline__ void read_gates(float* gate, const ChunkParams& p, const ChunkOf& chunk,
                                           int head) {
  const int i = threadIdx.x;
  if (i >= kTokens) return;
  const bool decays = i < chunk.count && p.g.rows.data;
  gate[i] = decays ? expf(gate_at<T>(p.g, chunk.batch, chunk.begin + i, head)) : 1.f;
}

// From the diagonal down.
template <int kTokens>
__device__ __forceinline__ void find_mask(float* mask, const float* gate) {
  const int j = threadIdx.x;
  if (j >= kTokens) return;
  float m = 1.f;
  for (int i = j; i < kTokens; ++i) {
    if (i > j) m *= gate[i];
    mask[i * PrepareShape<kTokens>::kPitch + j] = m;
  }
}

// In place of blocks on the diagonal, the inverses of I minus them. A thread a column; rows are
// `pitch` apart, and blocks `stride`.
template <int kTokens>
__device__ __forceinline__ void invert_blocks(float* blocks, int pitch, int stride) {
  const int column = threadIdx.x;
  float* const block = blocks + column / kBlock * stride;
  float x[kBlock];
  if (column < kTokens) {
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      x[i] = i == column % kBlock ? 1.f : 0.f;
#pragma unroll
      for (int j = 0; j < i; ++j) x[i] += block[i * pitch + j] * x[j];
    }
  }
  __syncthreads();
  if (column >= kTokens) return;
#pragma unroll
  for (int i = 0; i < kBlock; ++i) block[i * pitch + column % kBlock] = x[i];
}

// Scores, what is to be solved, factors and totals of one decay a token.
template <class T, int kTokens>
__global__ void __launch_bounds__(PrepareShape<kTokens>::kThreads, 1)
    prepare_chunks(const ChunkParams p) {
  constexpr int kPitch = PrepareShape<kTokens>::kPitch;
  ChunkOf chunk;
  if (!find_chunk<kTokens>(p, blockIdx.x / p.heads, chunk)) return;
  const int head = blockIdx.x % p.heads, tid = threadIdx.x, lane = tid % 32;
  const bool delta = p.beta.rows.data != nullptr;

  char* const memory = shared_memory();
  const int pitch = pitch_of(p.keys * sizeof(T));
  const Tile q{memory, pitch}, k{memory + kTokens * pitch, pitch};
  float* const mask = reinterpret_cast<float*>(k.data + kTokens * pitch);
  float* const solve = mask + kTokens * kPitch;
  float* const gate = solve + kTokens * kPitch;
  float* const beta = gate + kTokens;
  float* const q_norm = beta + kTokens;
  float* const k_norm = q_norm + kTokens;
  if (p.keys * sizeof(T) % 32 != 0) {
    clear_memory(memory, 2 * kTokens * pitch);
    __syncthreads();
  }
  copy_rows<T>(q, kTokens, chunk.count, row_at<T>(p.q, chunk.batch, chunk.begin, head / p.group),
               p.q.token_stride, p.keys, p.qk_aligned);
  copy_rows<T>(k, kTokens, chunk.count, row_at<T>(p.k, chunk.batch, chunk.begin, head / p.group),
               p.k.token_stride, p.keys, p.qk_aligned);
  commit_copies();
  read_gates<T, kTokens>(gate, p, chunk, head);
  if (tid < kTokens) {
    const bool inside = tid < chunk.count;
    beta[tid] = inside && delta ? gate_at<T>(p.beta, chunk.batch, chunk.begin + tid, head) : 0.f;
  }
  wait_copies<0>();
  __syncthreads();
  if (p.qk_l2norm) {
    normalize_rows<T, kTokens>(q_norm, q, p.keys);
    normalize_rows<T, kTokens>(k_norm, k, p.keys);
    __syncthreads();
  }
  find_mask<kTokens>(mask, gate);
  const int steps = (p.keys * static_cast<int>(sizeof(T)) + 31) / 32, first_row = tid / 32 * 16;
  Sums<1, kTokens / 8> scores, keys;
  scores.clear();
  keys.clear();
  multiply_rows<T>(scores, q, first_row, k, 0, steps);
  if (delta) multiply_rows<T>(keys, k, first_row, k, 0, steps);
  __syncthreads();

  const int64_t unit = blockIdx.x;
  T* const out = static_cast<T*>(p.prepared.scores) + unit * kTokens * kTokens;
#pragma unroll
  for (int block = 0; block < kTokens / 8; ++block) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = first_row + lane / 4 + 8 * half, j = 8 * block + lane % 4 * 2;
      float pair[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float m = mask[i * kPitch + j + e];
        pair[e] = j + e <= i ? scores.c[0][block][2 * half + e] * m * p.scale : 0.f;
        const float key = -beta[i] * m * keys.c[0][block][2 * half + e];
        if (delta) solve[i * kPitch + j + e] = j + e < i ? key : 0.f;
      }
      store_pair(out + i * kTokens + j, pair[0], pair[1]);
    }
  }
  if (tid < kTokens) {
    float* const factors = p.prepared.factors + unit * 4 * kTokens + tid;
    const float before = mask[tid * kPitch] * gate[0];
    const bool as_they_come = p.qk_l2norm && !p.prepared.rows;
    const float of_q = as_they_come ? q_norm[tid] : 1.f, of_k = as_they_come ? k_norm[tid] : 1.f;
    factors[0] = p.scale * before * of_q;
    factors[kTokens] = -beta[tid] * before * of_k;
    factors[2 * kTokens] = mask[(kTokens - 1) * kPitch + tid] * of_k;
    factors[3 * kTokens] = beta[tid];
  }
  T* const rows = static_cast<T*>(p.prepared.rows) + unit * 3 * kTokens * p.row;
  for (int i = tid; p.prepared.rows && i < kTokens * p.row; i += blockDim.x) {
    rows[i] = *q.element<T>(i / p.row, i % p.row);
    rows[i + 2 * kTokens * p.row] = *k.element<T>(i / p.row, i % p.row);
  }
  const float total = mask[(kTokens - 1) * kPitch] * gate[0];
  for (int c = tid; c < p.key_row; c += blockDim.x) {
    p.prepared.totals[unit * p.key_row + c] = total;
  }
  if (!delta) return;
  __syncthreads();
  invert_blocks<kTokens>(solve, kPitch, kBlock * (kPitch + 1));
  __syncthreads();
  for (int i = tid; i < kTokens * kTokens; i += blockDim.x) {
    p.prepared.solve[unit * kTokens * kTokens + i] = solve[i / kTokens * kPitch + i % kTokens];
  }
}

}  // namespace memkernels::scan::cuda
