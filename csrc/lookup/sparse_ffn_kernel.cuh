// y = sum_j w_j act(h_j) down_j with h_j = x . up_j, over the neurons j of a token. Backward, with
// s_j = dy . down_j: dw_j = act(h_j) s_j, dx = sum_j w_j act'(h_j) s_j up_j; the gradients of up_j
// and down_j are x and dy times w_j act'(h_j) s_j and w_j act(h_j), added up elsewhere.
//
// A block owns a token: its groups of lanes find the factors of neurons, then the columns of the
// sum. Few tokens have more blocks, in two launches: each with some neurons, then each with a slab
// of the columns.
//
// Cost: the 2 (backward 3) K rows of a token, read once, at 2 flops an element, so that memory is
// the limit: some 32 KiB are in flight a multiprocessor in a block of 256 threads, as much as an
// H200 needs, and 80 % of its copy bandwidth is expected of rows of 512 bytes and more. The third
// read of the backward finds rows in L2 as far as the tokens at work fit there.
#pragma once

#include "lookup/sparse_ffn_cuda.h"

namespace memkernels::lookup::cuda {

struct Activated {
  float value, slope;
};

__device__ __forceinline__ Activated activate(Activation activation, float h) {
  switch (activation) {
    case Activation::gelu: {
      const float below = 0.5f * erfcf(h * -0.70710678118654752440f);
      const float density = 0.39894228040143267794f * expf(-0.5f * h * h);
      return {h * below, below + h * density};
    }
    case Activation::gelu_tanh: {
      constexpr float kRoot = 0.79788456080286535588f, kCubic = 0.044715f;
      const float t = tanhf(kRoot * (h + kCubic * h * h * h));
      const float slope = (1 - t * t) * kRoot * (1 + 3 * kCubic * h * h);
      return {0.5f * h * (1 + t), 0.5f * (1 + t + h * slope)};
    }
    case Activation::silu: {
      const float s = 1 / (1 + expf(-h));
      return {h * s, s * (1 + h * (1 - s))};
    }
    case Activation::relu:
      return {h < 0 ? 0.f : h, h > 0 ? 1.f : 0.f};
    default:
      return {h, 1.f};
  }
}

// -1 where there is none.
__device__ __forceinline__ int neuron_at(const FfnParams& p, int64_t token, int i) {
  if (i >= p.listed) return -1;
  const int64_t row = integer_at(p.indices, token * p.index_row_stride + i * p.indices.stride);
  return row >= 0 && row < p.num_rows ? static_cast<int>(row) : -1;
}

template <class T>
__device__ __forceinline__ void store_factors(const FfnParams& p, int64_t token, int i, bool absent,
                                              float hidden, float received) {
  const int64_t to = token * p.listed + i;
  float weight = 1.f;
  if (p.weights && !absent) {
    weight = companion_at<T>(p.weights, p.weights_are_float,
                             token * p.weight_row_stride + i * p.weight_stride);
  }
  const Activated act = activate(p.activation, hidden);
  p.down_factors[to] = absent ? 0.f : weight * act.value;
  if (p.dy.data == nullptr) return;
  p.dweights[to] = absent ? 0.f : act.value * received;
  p.up_factors[to] = absent ? 0.f : weight * act.slope * received;
}

// Of neurons [begin, end) of a token, by a block.
template <class T, int kElements>
__device__ __forceinline__ void find_factors(const FfnParams& p, int64_t token, int begin,
                                             int end) {
  const int lanes = p.product_lanes, lane = threadIdx.x % lanes;
  const int step = blockDim.x / lanes * kProductRows;
  int rows[kProductRows];
  const auto find_rows = [&](int i) {
#pragma unroll
    for (int r = 0; r < kProductRows; ++r) rows[r] = neuron_at(p, token, i + r);
  };
  const int offset = threadIdx.x / lanes * kProductRows;
  find_rows(begin + offset);
  for (int first = begin; first < end; first += step) {
    float hidden[kProductRows], received[kProductRows] = {};
    multiply_rows<T, kElements>(hidden, p.up, rows, p.x, token, lanes);
    if (p.dy.data) multiply_rows<T, kElements>(received, p.down, rows, p.dy, token, lanes);
    int mine = rows[0];
    float h = hidden[0], s = received[0];
#pragma unroll
    for (int r = 1; r < kProductRows; ++r) {
      if (lane == r) mine = rows[r], h = hidden[r], s = received[r];
    }
    const int i = first + offset + lane;
    find_rows(first + step + offset);
    if (lane < kProductRows && i < end) store_factors<T>(p, token, i, mine < 0, h, s);
  }
}

// kElements: as many as a thread reads at once.
template <class T, int kElements>
__global__ void __launch_bounds__(kMostFfnThreads, 2) sparse_ffn(const FfnParams p) {
  const int64_t token = blockIdx.x / p.blocks;
  const int part = static_cast<int>(blockIdx.x % p.blocks);
  if (p.neurons > 0) {
    const int begin = part * p.neurons, left = p.listed - begin;
    find_factors<T, kElements>(p, token, begin, begin + (left < p.neurons ? left : p.neurons));
    __syncthreads();
  }
  if (p.slabs > 0) {
    const float* const factors = p.sum_factors + token * p.listed;
    const auto entry_at = [&](int i) {
      return Entry{neuron_at(p, token, i), i < p.listed ? factors[i] : 0.f};
    };
    sum_slabs<T, kElements>(static_cast<T*>(p.out) + token * p.summed.columns, p.summed, p.listed,
                            part * p.slabs, (part + 1) * p.slabs,
                            reinterpret_cast<float*>(shared_memory()), entry_at);
  }
}

}  // namespace memkernels::lookup::cuda
