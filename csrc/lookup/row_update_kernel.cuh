// One pass over each row that changes, its states and its gradient; a warp a row:
//   sgd      p -= lr (g + decay p)
//   adagrad  s += g^2 (or the mean of a row's), p -= lr g / (sqrt(s) + eps)
//   adam     m = b1 m + (1 - b1) g, s = b2 s + (1 - b2) g^2,
//            p = (1 - lr decay) p - lr / (1 - b1^step) m / (sqrt(s / (1 - b2^step)) + eps)
//
// Cost: an element in float32 moves 12, 20 and 28 bytes, with one accumulator a row also 12: bound
// by memory (4.8 TB/s of an H200).
#pragma once

#include "core/cuda/chunk.cuh"
#include "lookup/row_update_cuda.h"

namespace memkernels::lookup::cuda {

// A rule has a number of states of elements, and says what becomes of an element.
struct SgdRule {
  static constexpr int kStates = 0;

  __device__ __forceinline__ void begin_row(const RowUpdateParams&, int64_t, const float*) {}
  __device__ __forceinline__ float step(const RowUpdateParams& a, float p, float g, float&,
                                        float&) const {
    return p - a.lr * (g + a.decay * p);
  }
};

struct AdagradRule {
  static constexpr int kStates = 1;

  __device__ __forceinline__ void begin_row(const RowUpdateParams&, int64_t, const float*) {}
  __device__ __forceinline__ float step(const RowUpdateParams& a, float p, float g, float& sum,
                                        float&) const {
    sum += g * g;
    return p - a.lr * g / (sqrtf(sum) + a.eps);
  }
};

// One accumulator a row.
struct RowAdagradRule {
  static constexpr int kStates = 0;
  float root;

  __device__ __forceinline__ void begin_row(const RowUpdateParams& a, int64_t row,
                                            const float* grad) {
    const int lane = threadIdx.x % 32;
    float squares = 0.f;
    for (int d = lane; d < a.dim; d += 32) squares += grad[d] * grad[d];
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      squares += __shfl_xor_sync(kWholeWarp, squares, lanes);
    }
    float total = 0.f;
    if (lane == 0) {
      float& sum = static_cast<float*>(a.first.data)[row * a.first.stride];
      total = sum + squares / static_cast<float>(a.dim);
      sum = total;
    }
    root = sqrtf(__shfl_sync(kWholeWarp, total, 0)) + a.eps;
  }
  __device__ __forceinline__ float step(const RowUpdateParams& a, float p, float g, float&,
                                        float&) const {
    return p - a.lr * g / root;
  }
};

struct AdamRule {
  static constexpr int kStates = 2;

  __device__ __forceinline__ void begin_row(const RowUpdateParams&, int64_t, const float*) {}
  __device__ __forceinline__ float step(const RowUpdateParams& a, float p, float g, float& mean,
                                        float& square) const {
    mean = a.keep_mean * mean + a.take_mean * g;
    square = a.keep_square * square + a.take_square * (g * g);
    return a.keep * p - a.lr * mean / (sqrtf(square * a.correct_square) + a.eps);
  }
};

template <class T, int V>
__device__ __forceinline__ void load_state(const RowState& state, int64_t offset, float (&x)[V]) {
  if (state.is_float) {
    load(static_cast<const float*>(state.data) + offset, x);
  } else {
    load(static_cast<const T*>(state.data) + offset, x);
  }
}
template <class T, int V>
__device__ __forceinline__ void store_state(const RowState& state, int64_t offset,
                                            const float (&x)[V]) {
  if (state.is_float) {
    store(x, static_cast<float*>(state.data) + offset);
  } else {
    store(x, static_cast<T*>(state.data) + offset);
  }
}

template <class T, class Rule, int V>
__global__ void __launch_bounds__(kUpdateThreads, 1) update_rows(const RowUpdateParams p) {
  const int64_t given = at(p.count, 0), count = given < p.capacity ? given : p.capacity;
  const int64_t warps = int64_t{gridDim.x} * kUpdateWarps;
  int64_t i = int64_t{blockIdx.x} * kUpdateWarps + threadIdx.x / 32;
  for (; i < count; i += warps) {
    const int64_t row = at(p.rows, i);
    if (row < 0 || row >= p.num_rows) continue;
    const float* const grad = p.grads + i * p.grad_stride;
    T* const param = static_cast<T*>(p.param) + row * p.param_stride;
    const int64_t first = row * p.first.stride, second = row * p.second.stride;
    Rule rule;
    rule.begin_row(p, row, grad);
    for (int d = threadIdx.x % 32 * V; d < p.dim; d += 32 * V) {
      float x[V], g[V], y[V] = {}, z[V] = {};
      load(param + d, x);
      load(grad + d, g);
      if (Rule::kStates > 0) load_state<T>(p.first, first + d, y);
      if (Rule::kStates > 1) load_state<T>(p.second, second + d, z);
#pragma unroll
      for (int v = 0; v < V; ++v) x[v] = rule.step(p, x[v], g[v], y[v], z[v]);
      store(x, param + d);
      if (Rule::kStates > 0) store_state<T>(p.first, first + d, y);
      if (Rule::kStates > 1) store_state<T>(p.second, second + d, z);
    }
  }
}

}  // namespace memkernels::lookup::cuda
