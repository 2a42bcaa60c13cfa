// selective_scan of one token a row, in place: h = exp(delta A) h + delta u B; y = C . h + D u;
// out = y silu(z). Some lanes share a channel, four states each at a time, side by side.
//
// Cost: 8 bytes a state of the pool, and 4 of A, which rows find in L2 after the first; an
// exponential and some 8 instructions, a quarter of what an H200 does meanwhile: bound by memory.
#pragma once

#include "scan/selective_scan.cuh"

namespace memkernels::scan::cuda {

template <class T>
__global__ void __launch_bounds__(kSelectiveStepThreads)
    step_channels(const SelectiveStepParams p) {
  const int64_t row = blockIdx.x / p.blocks;
  const int lane = threadIdx.x % p.lanes;
  const int64_t channel =
      int64_t{blockIdx.x % p.blocks} * (kSelectiveStepThreads / p.lanes) + threadIdx.x / p.lanes;
  const int64_t slot = slot_of(p.state_indices, row, p.slots);
  const bool used = channel < p.dim;
  T* const out = static_cast<T*>(p.out) + row * p.dim + channel;
  if (slot < 0) {
    if (used && lane == 0) narrow(0.f, *out);
    return;
  }
  const auto of_channel = [&](const ScanRows& rows) {
    return widen(static_cast<const T*>(rows.data)[row * rows.strides[0] + channel]);
  };
  float u = 0.f, y = 0.f;
  if (used) {
    const int64_t group = channel / p.group_size;
    const auto of_group = [&](const ScanRows& rows) {
      return static_cast<const T*>(rows.data) + row * rows.strides[0] + group * rows.strides[1];
    };
    const T *const B = of_group(p.B), *const C = of_group(p.C);
    float* const state = p.state + slot * p.state_stride + channel * p.states;
    const float* const decays = p.A + channel * p.A_stride;
    u = of_channel(p.u);
    float delta = of_channel(p.delta);
    if (p.bias) delta += p.bias[channel];
    if (p.softplus) delta = softplus(delta);
    const float x = delta * u;
    for (int first = lane * kLaneStates; first < p.states; first += p.lanes * kLaneStates) {
      float h[kLaneStates], A[kLaneStates];
      load_states(state, first, p.states, h);
      load_states(decays, first, p.states, A);
#pragma unroll
      for (int i = 0; i < kLaneStates; ++i) {
        if (first + i >= p.states) continue;
        h[i] = exp2_fast(delta * to_base_2(A[i])) * h[i] + x * widen(B[first + i]);
        y += h[i] * widen(C[first + i]);
      }
      store_states(h, state, first, p.states);
    }
  }
  for (int lanes = p.lanes / 2; lanes > 0; lanes /= 2) {
    y += __shfl_xor_sync(kWholeWarp, y, lanes);
  }
  if (!used || lane > 0) return;
  if (p.D) y += p.D[channel] * u;
  if (p.z.data) {
    const float gate = of_channel(p.z);
    y *= gate * sigmoid(gate);
  }
  narrow(y, *out);
}

}  // namespace memkernels::scan::cuda
