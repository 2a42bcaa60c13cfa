#include "scan/route_indices.h"

#include <algorithm>

#include "core/cuda/sort.h"
#include "scan/route_indices_kernel.cuh"

namespace memkernels::scan::cuda {

void route_indices(const char* op, const RouteArgs& a, const Context& ctx) {
  RouteParams p{};
  p.ids = integers(a.expert_ids, 1);
  p.token_stride = a.expert_ids.stride[0];
  p.choices = static_cast<int>(a.expert_ids.shape[1]);
  p.rows = static_cast<int>(numel(a.expert_ids));
  p.memories = as_int(op, "memories", a.num_memories);
  p.order = static_cast<int64_t*>(a.order.data);
  p.inverse = static_cast<int64_t*>(a.inverse.data);
  p.cu_seqlens = static_cast<int*>(a.cu_seqlens.data);

  const DeviceGuard guard(op, ctx.device);
  if (p.rows > 0) {
    p.keys = static_cast<uint32_t*>(ctx.allocate(ctx, int64_t{p.rows} * 4));
    p.entries = static_cast<int*>(ctx.allocate(ctx, int64_t{p.rows} * 4));
    launch(op, ctx, list_choices, ceil_div(p.rows, kRouteThreads), kRouteThreads, 0, p);
    int bits = 1;
    while (bits < 32 && p.memories >> bits != 0) ++bits;
    sort_by_key(op, p.keys, p.entries, p.rows, bits, ctx);
  }
  const int64_t results = std::max<int64_t>(p.rows, int64_t{p.memories} + 2);
  launch(op, ctx, route_choices, ceil_div(results, kRouteThreads), kRouteThreads, 0, p);
}

}  // namespace memkernels::scan::cuda
