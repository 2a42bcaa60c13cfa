#include "lookup/engram_gate.h"

#include <algorithm>
#include <utility>

#include "core/check.h"
#include "core/memory.h"

namespace memkernels::lookup {

namespace {

void check_inputs(const char* op, const EngramGateArgs& a) {
  check_floating(op, "hidden", a.hidden);
  check_shape(op, "hidden", a.hidden, "[T, C, D]", {-1, -1, -1});
  const int64_t* shape = a.hidden.shape;
  check(shape[2] > 0, op, "hidden has dimension D of 0");
  check_shape(op, "k", a.k, "[T, C, D]", {shape[0], shape[1], shape[2]});
  check_shape(op, "v", a.v, "[T, D]", {shape[0], shape[2]});
  check_shape(op, "weight", a.weight, "[C, D]", {shape[1], shape[2]});
  check_companion(op, "weight", a.weight, a.hidden.dtype);
  for (const auto& [arg, t] : {std::pair{"k", &a.k}, {"v", &a.v}}) {
    check_dtype(op, arg, *t, a.hidden.dtype);
  }
  for (const auto& [arg, t] :
       {std::pair{"hidden", &a.hidden}, {"k", &a.k}, {"v", &a.v}, {"weight", &a.weight}}) {
    check_device(op, arg, *t, a.hidden.device);
    check_rows_contiguous(op, arg, *t);
  }
}

EngramGateKernel kernel_for(const EngramGateArgs& a) {
  const Isa isa = isa_for(a.hidden.dtype);
  return MEMKERNELS_CPU(isa, engram_gate_kernel)(a.hidden.dtype, a.weight.dtype != a.hidden.dtype);
}

}  // namespace

void engram_gate(const EngramGateArgs& a, const Context& ctx) {
  constexpr char op[] = "engram_gate";
  check_inputs(op, a);
#ifdef MEMKERNELS_WITH_CUDA
  if (ctx.device.type == DeviceType::cuda) return cuda::engram_gate(a, ctx);
#endif
  const EngramGateKernel kernel = kernel_for(a);
  const int64_t tokens = a.hidden.shape[0], token_elements = a.hidden.shape[1] * a.hidden.shape[2];
  const int64_t per_task = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, token_elements));
  const int64_t num_tasks = (tokens + per_task - 1) / per_task;
  run_tasks(ctx, num_tasks > 2 ? ctx.num_workers : 1, num_tasks, [&](int64_t task, int) {
    kernel.forward(a, task * per_task, std::min(tokens, (task + 1) * per_task));
  });
}

void engram_gate_backward(const EngramGateArgs& a, const EngramGateGrads& g, const Context& ctx) {
  constexpr char op[] = "engram_gate_backward";
  check_inputs(op, a);
  const int64_t* shape = a.hidden.shape;
  check_shape(op, "dout", g.dout, "[T, C, D]", {shape[0], shape[1], shape[2]});
  check_dtype(op, "dout", g.dout, a.hidden.dtype);
  check_device(op, "dout", g.dout, a.hidden.device);
  check_rows_contiguous(op, "dout", g.dout);
#ifdef MEMKERNELS_WITH_CUDA
  if (ctx.device.type == DeviceType::cuda) return cuda::engram_gate_backward(a, g, ctx);
#endif

  // Blocks of tokens, each with its part of dweight, depend on the shapes alone.
  constexpr int64_t kMostParts = 64, kLeastTokens = 8;
  const int64_t tokens = shape[0];
  const int64_t per_part = std::max(kLeastTokens, (tokens + kMostParts - 1) / kMostParts);
  const int64_t num_parts = (tokens + per_part - 1) / per_part;
  const EngramGateKernel kernel = kernel_for(a);
  const int64_t size = item_size(accumulator(a.hidden.dtype));
  const int64_t weights = numel(a.weight);
  const size_t part_bytes = weights * size, row_bytes = align_up(shape[2] * size);
  const int workers = tokens * weights > 65536 ? ctx.num_workers : 1;
  const Workspace workspace = allocate_workspace(workers * row_bytes + num_parts * part_bytes);
  char* rows = static_cast<char*>(workspace.get());
  char* parts = rows + workers * row_bytes;
  run_tasks(ctx, workers, num_parts, [&](int64_t i, int worker) {
    kernel.backward(a, g, i * per_part, std::min(tokens, (i + 1) * per_part),
                    parts + i * part_bytes, rows + worker * row_bytes);
  });
  if (!given(g.dweight)) return;
  constexpr int64_t kPerTask = 4096;
  run_tasks(ctx, workers, (weights + kPerTask - 1) / kPerTask, [&](int64_t i, int) {
    kernel.add_parts(g, parts, num_parts, i * kPerTask, std::min(weights, (i + 1) * kPerTask));
  });
}

}  // namespace memkernels::lookup
