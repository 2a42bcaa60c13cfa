// One token a row of linear attention or the delta rule, on a pool of states.
#pragma once

#include <stddef.h>

#include "core/context.h"
#include "core/isa.h"
#include "core/tensor.h"

namespace memkernels::scan {

struct StateStepArgs {
  TensorView q, k;           // [B, H, K]
  TensorView v;              // [B, HV, V]
  TensorView beta;           // [B, HV]: the delta rule; or absent: linear attention
  TensorView g;              // [HV], [B, HV] or [B, HV, K]; or absent
  TensorView state;          // [slots, HV, K, V], changed
  TensorView z;              // [slots, HV, K], changed; or absent
  TensorView state_indices;  // [B]; or absent
  double scale = 1;
  double eps = 1e-6;
  bool qk_l2norm = false;
  TensorView out;  // [B, HV, V], contiguous
};

void state_step(const char* op, const StateStepArgs& args, const Context& ctx);
namespace cuda {  // of checked ones
void state_step(const char* op, const StateStepArgs& args, const Context& ctx);
}

struct StateStepKernel {
  size_t (*scratch_bytes)(const StateStepArgs&);
  // Heads [begin, end) of the B * HV, and columns [first, last) of V. slots: of the rows, or -1.
  void (*run)(const StateStepArgs&, const int64_t* slots, int64_t begin, int64_t end, int64_t first,
              int64_t last, void* scratch);
};

MEMKERNELS_DECLARE_CPU(StateStepKernel, state_step_kernel, (Dtype dtype))

}  // namespace memkernels::scan
