#include "attention/merge_states.h"

#include <algorithm>

#include "core/check.h"

namespace memkernels::attention {

namespace {

void check_inputs(const char* op, const MergeStatesArgs& a) {
  check_floating(op, "outs", a.outs);
  check_shape(op, "outs", a.outs, "[n, T, H, D]", {-1, -1, -1, -1});
  const int64_t* shape = a.outs.shape;
  check_shape(op, "lses", a.lses, "[n, T, H]", {shape[0], shape[1], shape[2]});
  check_dtype(op, "lses", a.lses, accumulator(a.outs.dtype));
  check_device(op, "lses", a.lses, a.outs.device);
  check_rows_contiguous(op, "outs", a.outs);
}

MergeKernel kernel_for(const MergeStatesArgs& a) {
  const Isa isa = isa_for(a.outs.dtype);
  return MEMKERNELS_CPU(isa, merge_kernel)(a.outs.dtype);
}

template <class Row>
void for_each_row(const MergeStatesArgs& a, const Context& ctx, const Row& row) {
  const int64_t rows = a.outs.shape[1] * a.outs.shape[2];
  const int64_t row_elements = a.outs.shape[0] * std::max<int64_t>(1, a.outs.shape[3]);
  const int64_t per_task = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, row_elements));
  const int64_t num_tasks = (rows + per_task - 1) / per_task;
  run_tasks(ctx, num_tasks > 2 ? ctx.num_workers : 1, num_tasks, [&](int64_t task, int) {
    const int64_t end = std::min(rows, (task + 1) * per_task);
    for (int64_t r = task * per_task; r < end; ++r) row(r);
  });
}

}  // namespace

void merge_states(const MergeStatesArgs& a, const Context& ctx) {
  check_inputs("merge_states", a);
#ifdef MEMKERNELS_WITH_CUDA
  if (ctx.device.type == DeviceType::cuda) return cuda::merge_states(a, ctx);
#endif
  const MergeKernel kernel = kernel_for(a);
  for_each_row(a, ctx, [&](int64_t row) { kernel.forward(a, row); });
}

void merge_states_backward(const MergeStatesArgs& a, const MergeStatesGrads& g,
                           const Context& ctx) {
  constexpr char op[] = "merge_states_backward";
  check_inputs(op, a);
  const int64_t* shape = a.outs.shape;
  for (const auto& [arg, t] : {std::pair{"dout", &g.dout}, {"out", &a.out}}) {
    check_shape(op, arg, *t, "[T, H, D]", {shape[1], shape[2], shape[3]});
    check_dtype(op, arg, *t, a.outs.dtype);
    check_contiguous(op, arg, *t);
  }
  for (const auto& [arg, t] : {std::pair{"dlse", &g.dlse}, {"lse", &a.lse}}) {
    if (!given(*t)) continue;
    check_shape(op, arg, *t, "[T, H]", {shape[1], shape[2]});
    check_dtype(op, arg, *t, a.lses.dtype);
    check_contiguous(op, arg, *t);
  }
#ifdef MEMKERNELS_WITH_CUDA
  if (ctx.device.type == DeviceType::cuda) return cuda::merge_states_backward(a, g, ctx);
#endif
  const MergeKernel kernel = kernel_for(a);
  for_each_row(a, ctx, [&](int64_t row) { kernel.backward(a, g, row); });
}

}  // namespace memkernels::attention
