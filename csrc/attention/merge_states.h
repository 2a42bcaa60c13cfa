// Merges partial attention results by their log-sum-exp.
#pragma once

#include "core/context.h"
#include "core/isa.h"
#include "core/tensor.h"

namespace memkernels::attention {

struct MergeStatesArgs {
  TensorView outs;  // [n, T, H, D]
  TensorView lses;  // [n, T, H]
  TensorView out;   // [T, H, D], contiguous
  TensorView lse;   // [T, H], contiguous
};

void merge_states(const MergeStatesArgs& args, const Context& ctx);

// All gradients contiguous; dlse may be absent (zero).
struct MergeStatesGrads {
  TensorView dout;   // [T, H, D]
  TensorView dlse;   // [T, H] or absent
  TensorView douts;  // [n, T, H, D]
  TensorView dlses;  // [n, T, H]
};

void merge_states_backward(const MergeStatesArgs& args, const MergeStatesGrads& grads,
                           const Context& ctx);

namespace cuda {
void merge_states(const MergeStatesArgs& args, const Context& ctx);  // checked ones
void merge_states_backward(const MergeStatesArgs& args, const MergeStatesGrads& grads,
                           const Context& ctx);
}  // namespace cuda

// Both work on row `row` of the T * H rows.
struct MergeKernel {
  void (*forward)(const MergeStatesArgs&, int64_t row);
  void (*backward)(const MergeStatesArgs&, const MergeStatesGrads&, int64_t row);
};

MEMKERNELS_DECLARE_CPU(MergeKernel, merge_kernel, (Dtype dtype))

}  // namespace memkernels::attention
