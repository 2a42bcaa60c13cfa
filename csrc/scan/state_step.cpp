#include "scan/state_step.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "core/check.h"
#include "core/memory.h"
#include "scan/sequences.h"

namespace memkernels::scan {

namespace {

// A pool [slots, HV, ...] of blocks of `size` elements that different workers write.
void check_blocks(const char* op, const char* arg, const TensorView& t, int64_t size) {
  std::pair<int64_t, int64_t> dims[] = {{t.stride[0], t.shape[0]}, {t.stride[1], t.shape[1]}};
  std::sort(std::begin(dims), std::end(dims));
  int64_t least = size;
  for (const auto& [stride, count] : dims) {
    if (count <= 1) continue;
    check(stride >= least, op, arg, " has slots or heads that overlap");
    least = stride * (count - 1) + least;
  }
}

void check_gate(const char* op, const StateStepArgs& a) {
  const int64_t batch = a.v.shape[0], heads = a.v.shape[1], keys = a.k.shape[2];
  const int64_t expected[] = {batch, heads, keys};
  const int64_t* from = a.g.ndim == 1 ? expected + 1 : expected;
  const bool ok = a.g.ndim >= 1 && a.g.ndim <= 3 && std::equal(from, from + a.g.ndim, a.g.shape);
  check(ok, op, "g must be [HV] = [", heads, "], [B, HV] or [B, HV, K] = ", Sizes{expected, 3},
        ", got ", shape_of(a.g));
  check_companion(op, "g", a.g, a.q.dtype);
}

void check_inputs(const char* op, const StateStepArgs& a, const Context& ctx) {
  check_floating(op, "q", a.q);
  check_shape(op, "q", a.q, "[B, H, K]", {-1, -1, -1});
  const int64_t batch = a.q.shape[0], query_heads = a.q.shape[1], keys = a.q.shape[2];
  check(keys > 0, op, "q has dimension K of 0");
  check_shape(op, "k", a.k, "[B, H, K]", {batch, query_heads, keys});
  check_shape(op, "v", a.v, "[B, HV, V]", {batch, -1, -1});
  const int64_t heads = a.v.shape[1], values = a.v.shape[2];
  check(query_heads > 0 ? heads % query_heads == 0 : heads == 0, op, "v has ", heads,
        " heads, not a multiple of the ", query_heads, " of q");
  const Dtype wide = accumulator(a.q.dtype);
  check_dtype(op, "k", a.k, a.q.dtype);
  check_dtype(op, "v", a.v, a.q.dtype);
  if (given(a.beta)) {
    check_shape(op, "beta", a.beta, "[B, HV]", {batch, heads});
    check_companion(op, "beta", a.beta, a.q.dtype);
  }
  if (given(a.g)) check_gate(op, a);
  check_shape(op, "state", a.state, "[slots, HV, K, V]", {-1, heads, keys, values});
  check_dtype(op, "state", a.state, wide);
  TensorView matrix = a.state;
  matrix.shape[0] = matrix.shape[1] = 1;
  check_contiguous(op, "state, in K and V,", matrix);
  check_blocks(op, "state", a.state, keys * values);
  if (given(a.z)) {
    check_shape(op, "z", a.z, "[slots, HV, K]", {a.state.shape[0], heads, keys});
    check_dtype(op, "z", a.z, wide);
    check_blocks(op, "z", a.z, keys);
  }
  const std::pair<const char*, const TensorView*> inputs[] = {
      {"q", &a.q}, {"k", &a.k}, {"v", &a.v}, {"beta", &a.beta}, {"g", &a.g}, {"z", &a.z}};
  for (const auto& [arg, t] : inputs) {
    if (!given(*t)) continue;
    check_device(op, arg, *t, a.q.device);
    if (t->ndim == 3) check_rows_contiguous(op, arg, *t);
    check_apart(op, "state", a.state, arg, *t);
    if (t != &a.z) check_apart(op, "z", a.z, arg, *t);
  }
  check_device(op, "state", a.state, a.q.device);
  check_state_indices(op, a.state_indices, batch, a.state.shape[0], ctx);
}

}  // namespace

void state_step(const char* op, const StateStepArgs& a, const Context& ctx) {
  check_inputs(op, a, ctx);
#ifdef MEMKERNELS_WITH_CUDA
  if (ctx.device.type == DeviceType::cuda) return cuda::state_step(op, a, ctx);
#endif
  const int64_t batch = a.v.shape[0], values = a.v.shape[2];
  const int64_t heads = batch * a.v.shape[1];
  if (heads == 0 || (values == 0 && !given(a.z))) return;
  std::vector<int64_t> slots(batch);
  for (int64_t row = 0; row < batch; ++row) slots[row] = slot_of(a.state_indices, row);

  const Isa isa = isa_for(a.q.dtype);
  const StateStepKernel kernel = MEMKERNELS_CPU(isa, state_step_kernel)(a.q.dtype);
  const int64_t elements = a.k.shape[2] * values;
  const int workers = heads * elements > 65536 ? ctx.num_workers : 1;
  // Some heads a task, since a task asks for the state of one head while it works on another. A
  // few large states are cut along V instead; their z has one writer.
  const int64_t per_task = std::clamp<int64_t>(heads / (4 * workers), 1, 16);
  const int64_t groups = (heads + per_task - 1) / per_task;
  constexpr int64_t kColumns = 64;
  const int64_t most_pieces = given(a.z) ? 1 : std::max<int64_t>(1, workers / groups);
  const int64_t columns = ((values - 1) / (kColumns * most_pieces) + 1) * kColumns;
  const int64_t pieces = std::max<int64_t>(1, (values + columns - 1) / columns);
  const size_t scratch_bytes = kernel.scratch_bytes(a);
  const Workspace workspace = allocate_workspace(workers * scratch_bytes);
  char* const scratch = static_cast<char*>(workspace.get());
  run_tasks(ctx, workers, groups * pieces, [&](int64_t task, int worker) {
    const int64_t begin = task / pieces * per_task, first = task % pieces * columns;
    kernel.run(a, slots.data(), begin, std::min(heads, begin + per_task), first,
               std::min(values, first + columns), scratch + worker * scratch_bytes);
  });
}

}  // namespace memkernels::scan
