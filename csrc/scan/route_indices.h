// Tokens sorted by the memories they are sent to.
#pragma once

#include "core/context.h"
#include "core/tensor.h"

namespace memkernels::scan {

struct RouteArgs {
  TensorView expert_ids;  // [T, r]
  int64_t num_memories = 0;
  // Written, contiguous.
  TensorView order;       // [T * r] int64: the token of each row, or -1
  TensorView cu_seqlens;  // [num_memories + 2] int32
  TensorView inverse;     // [T, r] int64: the row of each choice, or -1
};

// On a CPU on the calling thread: what costs is to move the rows.
void route_indices(const char* op, const RouteArgs& args, const Context& ctx);
namespace cuda {  // of checked ones, but for what expert_ids hold
void route_indices(const char* op, const RouteArgs& args, const Context& ctx);
}

}  // namespace memkernels::scan
