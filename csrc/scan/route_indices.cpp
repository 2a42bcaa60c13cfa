// A counting sort, which keeps the order of tokens: memories are counted, the counts summed up to
// first rows, and each choice takes its memory's next row.
#include "scan/route_indices.h"

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/check.h"
#include "core/cuda/host_copy.h"

namespace memkernels::scan {

namespace {

int64_t memory_of(const RouteArgs& a, int64_t token, int64_t choice) {
  return index_at(a.expert_ids, token * a.expert_ids.stride[0] + choice * a.expert_ids.stride[1]);
}

// What each memory is sent, one place behind its own; refuses others.
std::vector<int64_t> count(const char* op, const RouteArgs& a) {
  std::vector<int64_t> counts(a.num_memories + 1);
  for (int64_t t = 0; t < a.expert_ids.shape[0]; ++t) {
    for (int64_t j = 0; j < a.expert_ids.shape[1]; ++j) {
      const int64_t memory = memory_of(a, t, j);
      check(memory >= -1 && memory < a.num_memories, op, "expert_ids[", t, ", ", j, "] is ", memory,
            ", outside of -1 to ", a.num_memories - 1);
      if (memory >= 0) ++counts[memory + 1];
    }
  }
  return counts;
}

}  // namespace

void route_indices(const char* op, const RouteArgs& a, [[maybe_unused]] const Context& ctx) {
  constexpr char arg[] = "expert_ids";
  check_shape(op, arg, a.expert_ids, "[T, r]", {-1, -1});
  check_index(op, arg, a.expert_ids);
  const int64_t tokens = a.expert_ids.shape[0], choices = a.expert_ids.shape[1];
  check(choices > 0, op, "expert_ids must have at least one column");
  const int64_t memories = a.num_memories, rows = tokens * choices;
  check(rows <= INT32_MAX, op, "expert_ids has ", rows, " entries, more than cu_seqlens can count");
#ifdef MEMKERNELS_WITH_CUDA
  if (ctx.device.type == DeviceType::cuda) {
    if (ctx.check_indices) {
      HostCopies copies(op, ctx);
      RouteArgs here = a;
      copies.replace(here.expert_ids);
      count(op, here);
    }
    return cuda::route_indices(op, a, ctx);
  }
#endif

  std::vector<int64_t> next = count(op, a);  // next row of a memory, when summed up
  int32_t* const bounds = static_cast<int32_t*>(a.cu_seqlens.data);
  for (int64_t m = 0; m <= memories; ++m) {
    if (m > 0) next[m] += next[m - 1];
    bounds[m] = static_cast<int32_t>(next[m]);
  }
  bounds[memories + 1] = static_cast<int32_t>(rows);

  int64_t* const order = static_cast<int64_t*>(a.order.data);
  int64_t* inverse = static_cast<int64_t*>(a.inverse.data);
  std::fill(order + next[memories], order + rows, -1);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t j = 0; j < choices; ++j, ++inverse) {
      const int64_t memory = memory_of(a, t, j);
      *inverse = memory < 0 ? -1 : next[memory]++;
      if (memory >= 0) order[*inverse] = t;
    }
  }
}

}  // namespace memkernels::scan
