// With S' = e^g S: u = beta (v - S'^T k) for the delta rule, or v; S = S' + k u^T, and
// o = scale (S'^T q + (q . k) u), so that S is read once and stays in registers until it is
// written. Rows of q and k are divided by their norms r_q and r_k where they meet in sums: S'^T k
// is r_k times that of k as it comes. With z = e^g z + k, a kernel before makes 1 / (z . q + eps /
// scale) of each head, for the tiles of a head have no order.
//
// A thread has some rows of some columns; sums over rows are added up in pairs of threads, of pairs
// and so on, in an order that depends on K alone, not on how many columns a tile has.
//
// Cost: 8 bytes an element of S, and some 15 instructions of the 50 that an H200 issues meanwhile:
// bound by memory.
#pragma once

#include "core/cuda/chunk.cuh"
#include "scan/sequences.cuh"
#include "scan/state_step_cuda.h"

namespace memkernels::scan::cuda {

// Elements of a row from `first` on, zeros behind its end.
template <class T, int kCount>
__device__ __forceinline__ void load_part(const T* row, int first, int size, bool aligned,
                                          float (&x)[kCount]) {
  if (aligned && first + kCount <= size) {
    load(row + first, x);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = first + i < size ? widen(row[first + i]) : 0.f;
  }
}

// The place of a head in a tensor [B, HV, ...] of such strides.
__device__ __forceinline__ int64_t place(const int64_t (&strides)[2], int64_t row, int64_t head) {
  return row * strides[0] + head * strides[1];
}

// A thread's part of a tile.
template <class T, bool kAligned>
struct StepPart {
  const StateStepParams& p;
  bool used;
  int64_t row, head;
  int lane, column, first_key;
  float* state;
  float decay;                       // of all channels
  float x[kStepRows][kStepColumns];  // e^g S
  float q[kStepRows], k[kStepRows];

  __device__ __forceinline__ int column_of(int c) const {
    return column + (kAligned ? c : c * p.lanes);
  }

  template <class X, class Y>
  __device__ __forceinline__ void load_columns(const X* from, Y (&to)[kStepColumns]) const {
    if constexpr (kAligned) {
      if (column < p.values) return load(from + column, to);
    }
#pragma unroll
    for (int c = 0; c < kStepColumns; ++c) {
      to[c] = !kAligned && column_of(c) < p.values ? widen(from[column_of(c)]) : 0.f;
    }
  }
  template <class X>
  __device__ __forceinline__ void store_columns(const float (&from)[kStepColumns], X* to) const {
    if constexpr (kAligned) {
      if (column < p.values) store(from, to + column);
    } else {
#pragma unroll
      for (int c = 0; c < kStepColumns; ++c) {
        if (column_of(c) < p.values) narrow(from[c], to[column_of(c)]);
      }
    }
  }

  // Rows of S from `first` on, and what multiplies them.
  __device__ __forceinline__ void fetch(int first) {
    first_key = first;
#pragma unroll
    for (int i = 0; i < kStepRows; ++i) {
      if (used && first + i < p.keys) {
        load_columns(state + int64_t{first + i} * p.values, x[i]);
      } else {
#pragma unroll
        for (int c = 0; c < kStepColumns; ++c) x[i][c] = 0.f;
      }
    }
    const int64_t query_head = head / p.group;
    const int keys = used ? p.keys : 0;
    load_part(static_cast<const T*>(p.q) + place(p.q_strides, row, query_head), first, keys,
              p.keys_aligned, q);
    load_part(static_cast<const T*>(p.k) + place(p.k_strides, row, query_head), first, keys,
              p.keys_aligned, k);
    float decays[kStepRows];
    if (p.channels) {
      const int64_t offset = place(p.g_strides, row, head);
      if (p.wide_g) {
        load_part(static_cast<const float*>(p.g) + offset, first, keys, p.keys_aligned, decays);
      } else {
        load_part(static_cast<const T*>(p.g) + offset, first, keys, p.keys_aligned, decays);
      }
    }
#pragma unroll
    for (int i = 0; i < kStepRows; ++i) {
      const float factor = p.channels ? expf(decays[i]) : decay;
#pragma unroll
      for (int c = 0; c < kStepColumns; ++c) x[i][c] *= factor;
    }
  }

  __device__ __forceinline__ void write(const float (&u)[kStepColumns]) {
#pragma unroll
    for (int i = 0; i < kStepRows; ++i) {
      if (first_key + i >= p.keys) break;
#pragma unroll
      for (int c = 0; c < kStepColumns; ++c) x[i][c] += k[i] * u[c];
      store_columns(x[i], state + int64_t{first_key + i} * p.values);
    }
  }
};

// e^g of a head, or 1 where there is none.
template <class T>
__device__ __forceinline__ float decay_of(const StateStepParams& p, int64_t row, int64_t head) {
  if (!p.g || p.channels) return 1.f;
  return expf(companion_at<T>(p.g, p.wide_g, place(p.g_strides, row, head)));
}

struct alignas(16) StepSums {
  float read[kStepColumns], recall[kStepColumns];  // S'^T q, S'^T k
  float along, squares_q, squares_k, unused;       // q . k, q . q, k . k
};

template <class T, bool kAligned>
__global__ void __launch_bounds__(kStepThreads, kStepBlocks) step_states(const StateStepParams p) {
  constexpr int kSums = sizeof(StepSums) / sizeof(float);
  const int tile_threads = p.lanes * p.classes;
  const int in_block = static_cast<int>(threadIdx.x) / tile_threads;
  const int tile = static_cast<int>(blockIdx.x * (blockDim.x / tile_threads)) + in_block;
  const int thread = static_cast<int>(threadIdx.x) % tile_threads;
  const int index = tile < p.tiles ? tile / p.pieces : 0;  // of a head of a row

  const int lane = thread % p.lanes, first = tile % p.pieces * p.lanes * kStepColumns;
  StepPart<T, kAligned> part{p};
  part.row = index / p.heads;
  part.head = index % p.heads;
  part.column = first + (kAligned ? lane * kStepColumns : lane);
  const int64_t slot = slot_of(p.state_indices, part.row, p.slots);
  part.used = tile < p.tiles && slot >= 0;
  part.state = p.state + place(p.state_strides, part.used ? slot : 0, part.head);
  part.decay = decay_of<T>(p, part.row, part.head);

  union {
    StepSums sums;
    float numbers[kSums];
  };
#pragma unroll
  for (int i = 0; i < kSums; ++i) numbers[i] = 0.f;
  const int step = p.classes * kStepRows, begin = thread / p.lanes * kStepRows;
  for (int pass = 0; pass < p.keys; pass += step) {
    part.fetch(pass + begin);
#pragma unroll
    for (int i = 0; i < kStepRows; ++i) {
      const float q = part.q[i], k = part.k[i];
#pragma unroll
      for (int c = 0; c < kStepColumns; ++c) {
        sums.read[c] += q * part.x[i][c];
        sums.recall[c] += k * part.x[i][c];
      }
      sums.along += q * k;
      sums.squares_q += q * q;
      sums.squares_k += k * k;
    }
  }

  for (int lanes = p.lanes; lanes < (tile_threads < 32 ? tile_threads : 32); lanes *= 2) {
#pragma unroll
    for (int i = 0; i < kSums - 1; ++i) {
      numbers[i] += __shfl_xor_sync(kWholeWarp, numbers[i], lanes);
    }
  }
  if (tile_threads > 32) {
    const auto all = reinterpret_cast<StepSums*>(shared_memory());  // [warps, lanes]
    const int warp = threadIdx.x / 32, warps = tile_threads / 32;
    if (threadIdx.x % 32 < p.lanes) all[warp * p.lanes + lane] = sums;
    __syncthreads();
    const StepSums* const from = all + warp / warps * warps * p.lanes + lane;
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      float of_warps[kStepThreads / 32];
#pragma unroll
      for (int w = 0; w < kStepThreads / 32; ++w) {
        of_warps[w] = w < warps ? reinterpret_cast<const float*>(from + w * p.lanes)[i] : 0.f;
      }
      numbers[i] = (of_warps[0] + of_warps[1]) + (of_warps[2] + of_warps[3]);
    }
  }
  if (tile >= p.tiles) return;

  float u[kStepColumns], out[kStepColumns] = {};
  if (part.used) {
    const float r_q = p.qk_l2norm ? 1.f / sqrtf(sums.squares_q + 1e-6f) : 1.f;
    const float r_k = p.qk_l2norm ? 1.f / sqrtf(sums.squares_k + 1e-6f) : 1.f;
    const float along = r_q * r_k * sums.along;
    const float factor = p.factors ? p.factors[index] : p.scale;
    part.load_columns(static_cast<const T*>(p.v) + place(p.v_strides, part.row, part.head), u);
    if (p.beta) {
      const int64_t offset = place(p.beta_strides, part.row, part.head);
      const float beta = companion_at<T>(p.beta, p.wide_beta, offset);
#pragma unroll
      for (int c = 0; c < kStepColumns; ++c) u[c] = beta * (u[c] - r_k * sums.recall[c]);
    }
#pragma unroll
    for (int c = 0; c < kStepColumns; ++c) {
      out[c] = factor * (r_q * sums.read[c] + along * u[c]);
      u[c] *= r_k;
    }
    for (int pass = 0; pass < p.keys; pass += step) {
      if (step < p.keys) part.fetch(pass + begin);  // more than registers hold
      part.write(u);
    }
  }
  if (begin == 0) part.store_columns(out, static_cast<T*>(p.out) + int64_t{index} * p.values);
}

// z = e^g z + k, and scale / (scale z . q + eps); a warp a head.
template <class T>
__global__ void __launch_bounds__(kStepThreads) step_normalisers(const StateStepParams p) {
  const int lane = threadIdx.x % 32;
  const int64_t index = int64_t{blockIdx.x} * (kStepThreads / 32) + threadIdx.x / 32;
  if (index >= p.all_heads) return;
  const int64_t row = index / p.heads, head = index % p.heads, query_head = head / p.group;
  const int64_t slot = slot_of(p.state_indices, row, p.slots);
  if (slot < 0) return;
  const T* const q = static_cast<const T*>(p.q) + place(p.q_strides, row, query_head);
  const T* const k = static_cast<const T*>(p.k) + place(p.k_strides, row, query_head);
  const int64_t gates = place(p.g_strides, row, head);
  const float decay = decay_of<T>(p, row, head);
  float* const z = p.z + place(p.z_strides, slot, head);
  float total = 0.f;
#pragma unroll 4
  for (int i = lane; i < p.keys; i += 32) {
    const float factor = p.channels ? expf(companion_at<T>(p.g, p.wide_g, gates + i)) : decay;
    const float x = factor * z[i] + widen(k[i]);
    z[i] = x;
    total += x * widen(q[i]);
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) total += __shfl_xor_sync(kWholeWarp, total, lanes);
  if (lane == 0) p.factors[index] = p.scale / (p.scale * total + p.eps);
}

}  // namespace memkernels::scan::cuda
