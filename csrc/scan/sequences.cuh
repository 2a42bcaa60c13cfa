// The sequences of a scan, and the slots of a pool, on the device. What lies outside of the tensors
// is cut off, or no slot.
#pragma once

#include "core/cuda/device.cuh"
#include "core/cuda/launch.h"
#include "scan/sequences.h"

namespace memkernels::scan::cuda {

using namespace memkernels::cuda;

struct SequenceParams {
  Integers cu_seqlens;  // [count + 1], or absent: one sequence a row of the batch
  int64_t count, tokens;
};

inline SequenceParams sequence_params(const Sequences& s) {
  return {integers(s.cu_seqlens), s.count, s.tokens};
}

__device__ __forceinline__ Span span_of(const SequenceParams& p, int64_t n) {
  if (!p.cu_seqlens.data) return {n, 0, p.tokens};
  const int64_t begin = clamp(at(p.cu_seqlens, n), 0, p.tokens);
  return {0, begin, clamp(at(p.cu_seqlens, n + 1), begin, p.tokens)};
}

// Of a row, or -1.
__device__ __forceinline__ int64_t slot_of(const Integers& state_indices, int64_t row,
                                           int64_t slots) {
  const int64_t slot = state_indices.data ? at(state_indices, row) : row;
  return slot < slots ? slot : -1;
}

}  // namespace memkernels::scan::cuda
