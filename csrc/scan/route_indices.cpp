// A counting sort, which keeps the order of tokens: memories are counted, the counts summed up to
// first rows, and each choice takes its memory's next row.
#include "scan/route_indices.h"

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/check.h"

namespace memkernels::scan {

void route_indices(const char* op, const RouteArgs& a, const Context& ctx) {
  (void)ctx;
  constexpr char arg[] = "expert_ids";
  check_shape(op, arg, a.expert_ids, "[T, r]", {-1, -1});
  check_index(op, arg, a.expert_ids);
  const int64_t tokens = a.expert_ids.shape[0], choices = a.expert_ids.shape[1];
  check(choices > 0, op, "expert_ids must have at least one column");
  const int64_t memories = a.num_memories, rows = tokens * choices;
  check(rows <= INT32_MAX, op, "expert_ids has ", rows, " entries, more than cu_seqlens can count");

  std::vector<int64_t> next(memories + 1);  // next row of a memory; at first, of the one before
  const auto memory_of = [&](int64_t token, int64_t choice) {
    return index_at(a.expert_ids, token * a.expert_ids.stride[0] + choice * a.expert_ids.stride[1]);
  };
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t j = 0; j < choices; ++j) {
      const int64_t memory = memory_of(t, j);
      check(memory >= -1 && memory < memories, op, "expert_ids[", t, ", ", j, "] is ", memory,
            ", outside of -1 to ", memories - 1);
      if (memory >= 0) ++next[memory + 1];
    }
  }
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
      const int64_t memory = memory_of(t, j);
      *inverse = memory < 0 ? -1 : next[memory]++;
      if (memory >= 0) order[*inverse] = t;
    }
  }
}

}  // namespace memkernels::scan
