#include "scan/feature_map.h"

#include <algorithm>
#include <limits>

#include "core/check.h"
#include "core/memory.h"

namespace memkernels::scan {

namespace {

void check_input(const char* op, const FeatureMapArgs& a) {
  check_floating(op, "x", a.x);
  check(a.x.ndim >= 1, op, "x must be [..., D], got a number");
  check_rows_contiguous(op, "x", a.x);
  check(a.x.shape[a.x.ndim - 1] > 0, op, "x has dimension D of 0");
}

// run(kernel, features, begin, end, scratch) for stretches of rows.
template <class Run>
void for_rows(const char* op, const FeatureMapArgs& a, const Context& ctx, const Run& run) {
  const int64_t dim = a.x.shape[a.x.ndim - 1], rows = numel(a.x) / dim;
  const int64_t features = num_features(op, a.kind, dim, a.nu);
  const Isa isa = isa_for(a.x.dtype);
  const FeatureMapKernel kernel = MEMKERNELS_CPU(isa, feature_map_kernel)(a.x.dtype);
  const int64_t per_task = std::max<int64_t>(1, 32768 / features);
  const int64_t num_tasks = (rows + per_task - 1) / per_task;
  const int workers = num_tasks > 2 ? ctx.num_workers : 1;
  const size_t scratch_bytes = kernel.scratch_bytes(dim, features);
  const Workspace workspace = allocate_workspace(workers * scratch_bytes);
  char* const scratch = static_cast<char*>(workspace.get());
  run_tasks(ctx, workers, num_tasks, [&](int64_t task, int worker) {
    run(kernel, features, task * per_task, std::min(rows, (task + 1) * per_task),
        scratch + worker * scratch_bytes);
  });
}

}  // namespace

int64_t num_features(const char* op, FeatureKind kind, int64_t dim, int64_t nu) {
  check(nu >= 1, op, "nu must be at least 1, got ", nu);
  switch (kind) {
    case FeatureKind::taylor2: {
      constexpr int64_t kMost = int64_t{1} << 31;
      check(dim <= kMost, op, "x has ", dim, " columns; taylor2 supported: up to ", kMost);
      return 1 + dim + dim * (dim + 1) / 2;
    }
    case FeatureKind::dpfp: {
      const int64_t most = std::numeric_limits<int64_t>::max() / 2 / std::max<int64_t>(1, dim);
      check(nu <= most, op, "nu must be at most ", most, " of ", dim, " columns, got ", nu);
      return 2 * dim * nu;
    }
    default:
      return dim;
  }
}

void feature_map(const FeatureMapArgs& a, const Context& ctx) {
  constexpr char op[] = "feature_map";
  check_input(op, a);
#ifdef MEMKERNELS_WITH_CUDA
  if (ctx.device.type == DeviceType::cuda) return cuda::feature_map(a, ctx);
#endif
  for_rows(op, a, ctx,
           [&](const FeatureMapKernel& kernel, int64_t features, int64_t begin, int64_t end,
               void* scratch) { kernel.forward(a, features, begin, end, scratch); });
}

void feature_map_backward(const FeatureMapArgs& a, const FeatureMapGrads& g, const Context& ctx) {
  constexpr char op[] = "feature_map_backward";
  check_input(op, a);
  const int last = a.x.ndim - 1;
  TensorView expected = a.x;
  expected.shape[last] = num_features(op, a.kind, a.x.shape[last], a.nu);
  const bool alike =
      g.dout.ndim == a.x.ndim && std::equal(g.dout.shape, g.dout.shape + last + 1, expected.shape);
  check(alike, op, "dout must be ", shape_of(expected), ", got ", shape_of(g.dout));
  check_dtype(op, "dout", g.dout, a.x.dtype);
  check_device(op, "dout", g.dout, a.x.device);
  check_rows_contiguous(op, "dout", g.dout);
#ifdef MEMKERNELS_WITH_CUDA
  if (ctx.device.type == DeviceType::cuda) return cuda::feature_map_backward(a, g, ctx);
#endif
  for_rows(op, a, ctx,
           [&](const FeatureMapKernel& kernel, int64_t features, int64_t begin, int64_t end,
               void* scratch) { kernel.backward(a, g, features, begin, end, scratch); });
}

}  // namespace memkernels::scan
