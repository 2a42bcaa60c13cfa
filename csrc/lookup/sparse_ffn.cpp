#include "lookup/sparse_ffn.h"

#include "attention/plan.h"
#include "core/check.h"
#include "core/cuda/host_copy.h"
#include "core/memory.h"
#include "lookup/bags.h"

namespace memkernels::lookup {

namespace {

void check_arguments(const char* op, const SparseFfnArgs& a) {
  check_floating(op, "x", a.x);
  check_shape(op, "x", a.x, "[T, D]", {-1, -1});
  check(a.x.shape[1] > 0, op, "x has rows of D = 0");
  check_rows_contiguous(op, "x", a.x);
  check_shape(op, "up", a.up, "[N, D]", {-1, a.x.shape[1]});
  check_shape(op, "down", a.down, "[N, Dout]", {a.up.shape[0], -1});
  check(a.down.shape[1] > 0, op, "down has rows of Dout = 0");
  for (const auto& [arg, table] : {std::pair{"up", &a.up}, {"down", &a.down}}) {
    check_dtype(op, arg, *table, a.x.dtype);
    check_device(op, arg, *table, a.x.device);
    check_rows_contiguous(op, arg, *table);
  }
  check_bags(op, "indices", "weights", {a.indices, {}, a.weights}, a.x.device, a.x.dtype);
  check_shape(op, "indices", a.indices, "[T, K]", {a.x.shape[0], -1});
}

#ifdef MEMKERNELS_WITH_CUDA
void check_contents(const char* op, const SparseFfnArgs& a, const Context& ctx) {
  if (!ctx.check_indices) return;
  HostCopies copies(op, ctx);
  TensorView indices = a.indices;
  copies.replace(indices);
  make_lists(op, "indices", {indices, {}, {}}, a.up.shape[0], Dtype::f32);
}
#endif

// Calls task(kernel, lists, begin, end, scratch) for blocks of tokens.
template <class Task>
void for_tokens(const char* op, const SparseFfnArgs& a, const Context& ctx, const Task& task) {
  const OwnedLists lists =
      make_lists(op, "indices", {a.indices, {}, a.weights}, a.up.shape[0], accumulator(a.x.dtype));
  const double work = static_cast<double>(numel(a.indices)) * (a.up.shape[1] + a.down.shape[1]);
  const int workers = attention::workers_for(ctx, work);
  const auto cuts = cut_lists(lists, a.up.shape[1], workers, true);
  const Isa isa = isa_for(a.x.dtype);
  const SparseFfnKernel kernel = MEMKERNELS_CPU(isa, sparse_ffn_kernel)(a.x.dtype);
  const size_t scratch_bytes = align_up(kernel.scratch_bytes(a));
  const Workspace workspace = allocate_workspace(workers * scratch_bytes);
  char* scratch = static_cast<char*>(workspace.get());
  run_tasks(ctx, workers, static_cast<int64_t>(cuts.size()), [&](int64_t i, int worker) {
    task(kernel, lists, cuts[i].begin, cuts[i].end, scratch + worker * scratch_bytes);
  });
}

}  // namespace

void sparse_ffn(const SparseFfnArgs& a, const Context& ctx) {
  constexpr char op[] = "sparse_ffn";
  check_arguments(op, a);
#ifdef MEMKERNELS_WITH_CUDA
  if (ctx.device.type == DeviceType::cuda) {
    check_contents(op, a, ctx);
    return cuda::sparse_ffn(a, ctx);
  }
#endif
  for_tokens(op, a, ctx, [&](auto& kernel, auto& lists, int64_t begin, int64_t end, void* scratch) {
    kernel.forward(a, lists, begin, end, scratch);
  });
}

void sparse_ffn_backward(const SparseFfnArgs& a, const SparseFfnGrads& g, const Context& ctx) {
  constexpr char op[] = "sparse_ffn_backward";
  check_arguments(op, a);
  check_shape(op, "dy", g.dy, "[T, Dout]", {a.x.shape[0], a.down.shape[1]});
  check_dtype(op, "dy", g.dy, a.x.dtype);
  check_device(op, "dy", g.dy, a.x.device);
  check_rows_contiguous(op, "dy", g.dy);
#ifdef MEMKERNELS_WITH_CUDA
  if (ctx.device.type == DeviceType::cuda) {
    check_contents(op, a, ctx);
    return cuda::sparse_ffn_backward(a, g, ctx);
  }
#endif
  for_tokens(op, a, ctx, [&](auto& kernel, auto& lists, int64_t begin, int64_t end, void* scratch) {
    kernel.backward(a, g, lists, begin, end, scratch);
  });
}

}  // namespace memkernels::lookup
