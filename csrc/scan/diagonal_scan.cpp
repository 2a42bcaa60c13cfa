#include "scan/diagonal_scan.h"

#include <algorithm>

#include "core/check.h"
#include "core/memory.h"

namespace memkernels::scan {

namespace {

// `like`: x or h, whose sizes and dtype the others follow.
struct Checks {
  const char* op;
  const TensorView& like;
  int64_t count;  // sequences

  bool complex() const { return like.ndim == 4; }

  void same(const char* arg, const TensorView& t, Dtype dtype) const {
    check_dtype(op, arg, t, dtype);
    check_device(op, arg, t, like.device);
    check_rows_contiguous(op, arg, t);
    check(!complex() || t.stride[t.ndim - 2] == 2 || t.shape[t.ndim - 2] == 1 || numel(t) == 0, op,
          arg, " must be contiguous in D");
  }
  void of_tokens(const char* arg, const TensorView& t) const {
    const int64_t* n = like.shape;
    complex() ? check_shape(op, arg, t, "[B, T, D, 2]", {n[0], n[1], n[2], 2})
              : check_shape(op, arg, t, "[B, T, D]", {n[0], n[1], n[2]});
    same(arg, t, like.dtype);
  }
  void of_channels(const char* arg, const TensorView& t) const {
    const int64_t dim = like.shape[2];
    complex() ? check_shape(op, arg, t, "[D, 2]", {dim, 2}) : check_shape(op, arg, t, "[D]", {dim});
    same(arg, t, like.dtype);
  }
  void of_sequences(const char* arg, const TensorView& t) const {
    if (!given(t)) return;
    const int64_t dim = like.shape[2];
    complex() ? check_shape(op, arg, t, "[N, D, 2]", {count, dim, 2})
              : check_shape(op, arg, t, "[N, D]", {count, dim});
    same(arg, t, accumulator(like.dtype));
  }
};

void check_inputs(const Checks& checks, const char* arg, const DiagonalScanArgs& s,
                  const Context& ctx) {
  check_contents(checks.op, s.sequences, ctx);
  const TensorView& like = checks.like;
  check_floating(checks.op, arg, like);
  check(like.ndim == 3 || like.ndim == 4, checks.op, arg,
        " must be [B, T, D] or [B, T, D, 2], got ", shape_of(like));
  checks.of_tokens(arg, like);
  s.a.ndim == like.ndim ? checks.of_tokens("a", s.a) : checks.of_channels("a", s.a);
  checks.of_sequences("initial_state", s.initial_state);
  if (!given(s.reset)) return;
  check_shape(checks.op, "reset", s.reset, "[B, T]", {like.shape[0], like.shape[1]});
  check_dtype(checks.op, "reset", s.reset, Dtype::u8);
  check_device(checks.op, "reset", s.reset, like.device);
}

// Calls body(kernel, sequence, begin, end, scratch) for pieces of all sequences' rows.
template <class Body>
void for_pieces(const Checks& checks, const Context& ctx, const Body& body) {
  const TensorView& like = checks.like;
  const Isa isa = isa_for(like.dtype);
  const DiagonalScanKernel kernel =
      MEMKERNELS_CPU(isa, diagonal_scan_kernel)(like.dtype, checks.complex());
  const int64_t width = like.shape[2] * (checks.complex() ? 2 : 1);
  const int workers = numel(like) > 65536 ? ctx.num_workers : 1;
  // A few tasks a worker; no bit depends on where rows are cut.
  constexpr int64_t kLeast = 64, kTasks = 4;
  const int64_t wanted =
      workers > 1 ? kTasks * workers / std::max<int64_t>(1, checks.count) + 1 : 1;
  const int64_t size = std::max<int64_t>(kLeast, ((width - 1) / wanted / kLeast + 1) * kLeast);
  const int64_t pieces = (width + size - 1) / size;
  const size_t bytes = align_up(3 * size * item_size(accumulator(like.dtype)));
  const Workspace workspace = allocate_workspace(workers * bytes);
  char* const scratch = static_cast<char*>(workspace.get());
  run_tasks(ctx, workers, checks.count * pieces, [&](int64_t i, int worker) {
    const int64_t begin = i % pieces * size;
    body(kernel, i / pieces, begin, std::min(width, begin + size), scratch + worker * bytes);
  });
}

}  // namespace

void diagonal_scan(const DiagonalScanArgs& s, const Context& ctx) {
  const Checks checks{"diagonal_scan", s.x, s.sequences.count};
  check_inputs(checks, "x", s, ctx);
#ifdef MEMKERNELS_WITH_CUDA
  if (ctx.device.type == DeviceType::cuda) return cuda::diagonal_scan(s, ctx);
#endif
  for_pieces(checks, ctx,
             [&](const DiagonalScanKernel& kernel, int64_t sequence, int64_t begin, int64_t end,
                 void* scratch) { kernel.forward(s, sequence, begin, end, scratch); });
}

void diagonal_scan_backward(const DiagonalScanArgs& s, const DiagonalScanGrads& g,
                            const Context& ctx) {
  const Checks checks{"diagonal_scan_backward", s.h, s.sequences.count};
  check_inputs(checks, "h", s, ctx);
  checks.of_tokens("dh", g.dh);
  checks.of_sequences("dstate", g.dstate);
#ifdef MEMKERNELS_WITH_CUDA
  if (ctx.device.type == DeviceType::cuda) return cuda::diagonal_scan_backward(s, g, ctx);
#endif
  for_pieces(checks, ctx,
             [&](const DiagonalScanKernel& kernel, int64_t sequence, int64_t begin, int64_t end,
                 void* scratch) { kernel.backward(s, g, sequence, begin, end, scratch); });
}

}  // namespace memkernels::scan
