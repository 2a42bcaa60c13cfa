// lse = log sum_n e^lse_n, out = sum_n e^(lse_n - lse) out_n; a warp a row.
//
// Backward, with w_n = e^(lse_n - lse): d out_n = w_n dout,
// d lse_n = w_n (dout . (out_n - out) + dlse).
//
// Cost: outs read once and out written once, 3 flops an element: bound by memory.
#pragma once

#include "attention/merge_states.h"
#include "core/cuda/device.cuh"

namespace memkernels::attention::cuda {

using namespace memkernels::cuda;

inline constexpr int kMergeRows = 4;  // of a block

// MergeStatesArgs and MergeStatesGrads, for the device.
struct MergeParams {
  const void* outs;
  const float* lses;
  int64_t out_strides[3], lse_strides[3];  // part, token, head
  void* out;
  float* lse;
  const void* dout;
  const float* dlse;  // or null
  void* douts;
  float* dlses;
  int64_t rows;
  int parts, heads, dim;
};

// w_n = e^(lse_n - most) / total, which stays exact where lse itself is large.
struct MergeWeights {
  float most = -kInfinity, total = 0.f;

  __device__ __forceinline__ float of(float lse) const { return expf(lse - most) / total; }
};

template <class T>
struct MergeRow {
  const MergeParams& p;
  int64_t token, head;

  __device__ __forceinline__ const T* part(int n) const {
    return static_cast<const T*>(p.outs) + n * p.out_strides[0] + token * p.out_strides[1] +
           head * p.out_strides[2];
  }
  __device__ __forceinline__ float lse(int n) const {
    return p.lses[n * p.lse_strides[0] + token * p.lse_strides[1] + head * p.lse_strides[2]];
  }
  __device__ __forceinline__ MergeWeights weights() const {
    MergeWeights w;
    for (int n = 0; n < p.parts; ++n) w.most = fmaxf(w.most, lse(n));
    for (int n = 0; n < p.parts; ++n) {
      if (lse(n) != -kInfinity) w.total += expf(lse(n) - w.most);
    }
    return w;
  }
};

template <class T>
__global__ void __launch_bounds__(32 * kMergeRows, 1) merge(const MergeParams p) {
  const int64_t index = int64_t{blockIdx.x} * kMergeRows + threadIdx.x / 32;
  if (index >= p.rows) return;
  const int lane = threadIdx.x % 32;
  const MergeRow<T> row{p, index / p.heads, index % p.heads};
  const MergeWeights weights = row.weights();
  if (lane == 0)
    p.lse[index] = weights.total == 0 ? -kInfinity : weights.most + logf(weights.total);
  T* const out = static_cast<T*>(p.out) + index * p.dim;
  constexpr int kColumns = 8;  // of a lane at a time, so that a weight serves many elements
  for (int first = 0; first < p.dim; first += 32 * kColumns) {
    float sums[kColumns] = {};
    for (int n = 0; n < p.parts; ++n) {
      if (row.lse(n) == -kInfinity) continue;
      const float weight = weights.of(row.lse(n));
      const T* const part = row.part(n);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        const int d = first + 32 * i + lane;
        if (d < p.dim) sums[i] += weight * widen(part[d]);
      }
    }
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int d = first + 32 * i + lane;
      if (d < p.dim) narrow(sums[i], out[d]);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(32 * kMergeRows, 1) merge_backward(const MergeParams p) {
  const int64_t index = int64_t{blockIdx.x} * kMergeRows + threadIdx.x / 32;
  if (index >= p.rows) return;
  const int lane = threadIdx.x % 32;
  const MergeRow<T> row{p, index / p.heads, index % p.heads};
  const MergeWeights weights = row.weights();
  const T* const out = static_cast<const T*>(p.out) + index * p.dim;
  const T* const dout = static_cast<const T*>(p.dout) + index * p.dim;
  const float dlse = p.dlse ? p.dlse[index] : 0.f;
  for (int n = 0; n < p.parts; ++n) {
    const int64_t to = n * p.rows + index;
    T* const douts = static_cast<T*>(p.douts) + to * p.dim;
    const bool empty = row.lse(n) == -kInfinity;
    const float weight = empty ? 0.f : weights.of(row.lse(n));
    float dot = 0.f;
    for (int d = lane; d < p.dim; d += 32) {
      const float x = empty ? 0.f : widen(dout[d]);
      if (!empty) dot += x * (widen(row.part(n)[d]) - widen(out[d]));
      narrow(weight * x, douts[d]);
    }
    for (int lanes = 16; lanes > 0; lanes /= 2) dot += __shfl_xor_sync(kWholeWarp, dot, lanes);
    if (lane == 0) p.dlses[to] = empty ? 0.f : weight * (dot + dlse);
  }
}

}  // namespace memkernels::attention::cuda
