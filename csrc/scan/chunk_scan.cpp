#include "scan/chunk_scan.h"

#include <algorithm>
#include <utility>

#include "attention/plan.h"
#include "core/check.h"
#include "core/memory.h"

namespace memkernels::scan {

namespace {

Sequences check_arguments(const char* op, ChunkScanArgs& a, const Context& ctx) {
  check_floating(op, "q", a.q);
  check_shape(op, "q", a.q, "[B, T, H, K]", {-1, -1, -1, -1});
  const int64_t B = a.q.shape[0], T = a.q.shape[1], H = a.q.shape[2], K = a.q.shape[3];
  check(K > 0, op, "q has rows of K = 0");
  check_shape(op, "k", a.k, "[B, T, H, K]", {B, T, H, K});
  check_shape(op, "v", a.v, "[B, T, HV, V]", {B, T, -1, -1});
  const int64_t HV = a.v.shape[2], V = a.v.shape[3];
  check(V > 0, op, "v has rows of V = 0");
  check(H > 0 && HV % H == 0, op, "v has ", HV, " heads, which must be a multiple of q's ", H);
  for (const auto& [arg, t] : {std::pair{"k", &a.k}, {"v", &a.v}}) {
    check_dtype(op, arg, *t, a.q.dtype);
    check_device(op, arg, *t, a.q.device);
  }
  if (given(a.beta)) {
    check_shape(op, "beta", a.beta, "[B, T, HV]", {B, T, HV});
    check_companion(op, "beta", a.beta, a.q.dtype);
    check_device(op, "beta", a.beta, a.q.device);
  }
  if (given(a.g)) {
    if (a.g.ndim == 1) {
      check_shape(op, "g", a.g, "[HV]", {HV});
      const int64_t stride = a.g.stride[0];
      a.g.ndim = 3;
      const int64_t shape[] = {B, T, HV}, strides[] = {0, 0, stride};
      std::copy_n(shape, 3, a.g.shape);
      std::copy_n(strides, 3, a.g.stride);
    }
    check(a.g.ndim == 3 || a.g.ndim == 4, op, "g must be [HV], [B, T, HV] or [B, T, HV, K], got ",
          shape_of(a.g));
    if (a.g.ndim == 3) {
      check_shape(op, "g", a.g, "[B, T, HV]", {B, T, HV});
    } else {
      check_shape(op, "g", a.g, "[B, T, HV, K]", {B, T, HV, K});
      check_rows_contiguous(op, "g", a.g);
    }
    check_companion(op, "g", a.g, a.q.dtype);
    check_device(op, "g", a.g, a.q.device);
  }
  for (const auto& [arg, t] : {std::pair{"q", &a.q}, {"k", &a.k}, {"v", &a.v}}) {
    check_rows_contiguous(op, arg, *t);
  }
  const Sequences sequences = make_sequences(op, a.cu_seqlens, B, T, a.q.device);
  check_contents(op, sequences, ctx);
  const Dtype wide = accumulator(a.q.dtype);
  const int64_t N = sequences.count;
  if (given(a.initial_state)) {
    check_shape(op, "initial_state", a.initial_state, "[N, HV, K, V]", {N, HV, K, V});
    check_dtype(op, "initial_state", a.initial_state, wide);
    check_device(op, "initial_state", a.initial_state, a.q.device);
    check_rows_contiguous(op, "initial_state", a.initial_state);
  }
  if (given(a.initial_z)) {
    check(a.normalize, op, "initial_z is for normalize=True");
    check_shape(op, "initial_z", a.initial_z, "[N, HV, K]", {N, HV, K});
    check_dtype(op, "initial_z", a.initial_z, wide);
    check_device(op, "initial_z", a.initial_z, a.q.device);
    check_rows_contiguous(op, "initial_z", a.initial_z);
  }
  return sequences;
}

double multiply_adds(const ChunkScanArgs& a) { return 2.0 * numel(a.v) * a.q.shape[3]; }

}  // namespace

void chunk_scan(const char* op, ChunkScanArgs a, const Context& ctx) {
  const Sequences sequences = check_arguments(op, a, ctx);
  const int64_t heads = a.v.shape[2], pairs = sequences.count * heads;
  if (pairs == 0) return;
#ifdef MEMKERNELS_WITH_CUDA
  if (ctx.device.type == DeviceType::cuda) return cuda::chunk_scan(op, a, sequences, ctx);
#endif
  const ChunkScanKernel kernel = MEMKERNELS_CPU(isa_for(a.q.dtype), chunk_scan_kernel)(a.q.dtype);
  const int64_t panels = (a.v.shape[3] + kernel.panel - 1) / kernel.panel;
  const int workers = attention::workers_for(ctx, multiply_adds(a));
  // Few heads are cut into columns of V, at the price of their scores computed again.
  const int64_t wanted = pairs >= 2 * workers ? 1 : (2 * workers + pairs - 1) / pairs;
  const int64_t slices = workers == 1 ? 1 : std::min(panels, wanted);
  const size_t scratch_bytes = align_up(kernel.scratch_bytes(a));
  const Workspace workspace = allocate_workspace(workers * scratch_bytes);
  char* scratch = static_cast<char*>(workspace.get());
  run_tasks(ctx, workers, pairs * slices, [&](int64_t i, int worker) {
    const int64_t pair = i / slices, slice = i % slices, sequence = pair / heads;
    kernel.forward(a, {sequence, pair % heads, sequences[sequence]}, slice * panels / slices,
                   (slice + 1) * panels / slices, scratch + worker * scratch_bytes);
  });
}

void chunk_scan_backward(const char* op, ChunkScanArgs a, const ChunkScanGrads& g,
                         const Context& ctx) {
  const Sequences sequences = check_arguments(op, a, ctx);
  const int64_t heads = a.v.shape[2], pairs = sequences.count * heads;
  const int64_t* shape = a.v.shape;
  check_shape(op, "dout", g.dout, "[B, T, HV, V]", {shape[0], shape[1], shape[2], shape[3]});
  check_dtype(op, "dout", g.dout, a.q.dtype);
  check_contiguous(op, "dout", g.dout);
  const Dtype wide = accumulator(a.q.dtype);
  if (given(g.dstate)) {
    check_shape(op, "dstate", g.dstate, "[N, HV, K, V]",
                {sequences.count, heads, a.q.shape[3], shape[3]});
    check_dtype(op, "dstate", g.dstate, wide);
    check_contiguous(op, "dstate", g.dstate);
  }
  if (given(g.dz)) {
    check_shape(op, "dz", g.dz, "[N, HV, K]", {sequences.count, heads, a.q.shape[3]});
    check_dtype(op, "dz", g.dz, wide);
    check_contiguous(op, "dz", g.dz);
  }
  if (pairs == 0) return;
#ifdef MEMKERNELS_WITH_CUDA
  if (ctx.device.type == DeviceType::cuda) {
    return cuda::chunk_scan_backward(op, a, g, sequences, ctx);
  }
#endif
  const ChunkScanBackwardKernel kernel =
      MEMKERNELS_CPU(isa_for(a.q.dtype), chunk_scan_backward_kernel)(a.q.dtype);
  const int workers = attention::workers_for(ctx, 3 * multiply_adds(a));
  int64_t longest = 0;
  for (int64_t n = 0; n < sequences.count; ++n) {
    longest = std::max(longest, sequences[n].end - sequences[n].begin);
  }
  const size_t scratch_bytes = align_up(kernel.scratch_bytes(a, longest));
  const Workspace workspace = allocate_workspace(workers * scratch_bytes);
  char* scratch = static_cast<char*>(workspace.get());
  run_tasks(ctx, workers, pairs, [&](int64_t i, int worker) {
    const int64_t sequence = i / heads;
    kernel.backward(a, g, {sequence, i % heads, sequences[sequence]},
                    scratch + worker * scratch_bytes);
  });
}

}  // namespace memkernels::scan
