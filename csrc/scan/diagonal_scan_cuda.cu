#include "scan/diagonal_scan.h"

#include "scan/diagonal_scan_kernel.cuh"

namespace memkernels::scan::cuda {

namespace {

DiagonalParams params_of(const char* op, const char* arg, const TensorView& x,
                         const DiagonalScanArgs& s) {
  check_supported(op, arg, x);
  const bool complex = x.ndim == 4;
  DiagonalParams p{};
  p.x = x.data;
  p.a = s.a.data;
  copy_strides(x, p.x_strides);
  copy_strides(s.a, p.a_strides);
  p.constant = s.a.ndim < x.ndim;
  p.reset = static_cast<const uint8_t*>(s.reset.data);
  copy_strides(s.reset, p.reset_strides);
  p.columns = as_int(op, "columns", x.shape[2] * (complex ? 2 : 1) + kGroupColumns) - kGroupColumns;
  p.groups = static_cast<int>(ceil_div(p.columns, kGroupColumns));
  p.aligned = p.columns * item_size(x.dtype) % 16 == 0 && is_aligned(x, 2, 16) &&
              (p.constant || is_aligned(s.a, 2, 16));
  return p;
}

template <class T, bool kBackward>
void run(const char* op, DiagonalParams p, const Sequences& sequences, bool complex,
         const Context& ctx) {
  const auto kernel =
      complex ? diagonal_scan<T, true, kBackward> : diagonal_scan<T, false, kBackward>;
  const int64_t tensors = 1 + !p.constant + (p.h != nullptr);
  const int64_t stage_bytes = tensors * kPartTokens * kGroupColumns * sizeof(T);
  const Limits limits = limits_of(op, ctx.device);
  const int64_t blocks = sequences.count * p.groups;
  const int64_t enough = limits.multiprocessors * (limits.of_multiprocessor / (2 * stage_bytes));
  const int64_t row_bytes = kGroupColumns * sizeof(T);
  const auto shared_bytes = [&](int64_t warps) {
    return warps * (row_bytes + 2 * (stage_bytes + 32 * sizeof(Summary))) +
           2 * kDiagonalWarps * sizeof(int);
  };
  int warps = 1;
  while (2 * warps <= kDiagonalWarps && warps * kPartTokens < sequences.tokens &&
         blocks * warps < enough && shared_bytes(2 * warps) <= limits.of_block) {
    warps *= 2;
  }
  p.parts = part_params(sequences, kPartTokens);
  // Blocks that take whole sequences read everything once; a third of the multiprocessors can do
  // that about as fast as all of them can read twice.
  constexpr int kLeastTiles = 4;
  if (blocks > ceil_div(limits.multiprocessors, 3) ||
      sequences.tokens <= kLeastTiles * warps * kPartTokens) {
    launch(op, ctx, kernel, blocks, 32 * warps, shared_bytes(warps), p);
    return;
  }
  constexpr int kWarps = 4;
  p.tiles = part_params(sequences, kWarps * kPartTokens);
  const int64_t lanes = p.groups * 32, summaries = p.parts.count * lanes * sizeof(Summary);
  p.summaries = static_cast<Summary*>(ctx.allocate(ctx, summaries));
  p.cuts = static_cast<int*>(ctx.allocate(ctx, p.parts.count * sizeof(int)));
  const auto parts = [&](DiagonalParams q, DiagonalWork work) {
    q.work = work;
    if (work == DiagonalWork::sum_up) q.h = nullptr;
    launch(op, ctx, kernel, p.tiles.count * p.groups, 32 * kWarps,
           kWarps * (row_bytes + stage_bytes), q);
  };
  parts(p, DiagonalWork::sum_up);
  launch(op, ctx, complex ? pass_carries<true> : pass_carries<false>,
         ceil_div(sequences.count * lanes, 32 * kDiagonalWarps), 32 * kDiagonalWarps, 0, p,
         kBackward);
  parts(p, DiagonalWork::apply);
}

}  // namespace

void diagonal_scan(const DiagonalScanArgs& s, const Context& ctx) {
  constexpr char op[] = "diagonal_scan";
  DiagonalParams p = params_of(op, "x", s.x, s);
  p.start = static_cast<const float*>(s.initial_state.data);
  p.start_stride = s.initial_state.stride[0];
  p.out = s.h.data;
  p.end = static_cast<float*>(s.state.data);
  const DeviceGuard guard(op, ctx.device);
  with_type(s.x.dtype,
            [&](auto type) { run<decltype(type), false>(op, p, s.sequences, s.x.ndim == 4, ctx); });
}

void diagonal_scan_backward(const DiagonalScanArgs& s, const DiagonalScanGrads& g,
                            const Context& ctx) {
  constexpr char op[] = "diagonal_scan_backward";
  const bool complex = s.h.ndim == 4;
  DiagonalParams p = params_of(op, "dh", g.dh, s);
  p.start = static_cast<const float*>(g.dstate.data);
  p.start_stride = g.dstate.stride[0];
  p.initial = static_cast<const float*>(s.initial_state.data);
  p.initial_stride = s.initial_state.stride[0];
  p.out = g.dx.data;
  p.end = static_cast<float*>(g.dinitial_state.data);
  if (given(g.da)) {
    p.h = s.h.data;
    copy_strides(s.h, p.h_strides);
    p.aligned = p.aligned && is_aligned(s.h, 2, 16);
    const PartParams parts = part_params(s.sequences, kPartTokens);
    if (p.constant) {
      p.sums = static_cast<float*>(ctx.allocate(ctx, parts.count * p.columns * sizeof(float)));
    } else {
      p.da = g.da.data;
    }
  }
  const DeviceGuard guard(op, ctx.device);
  with_type(s.h.dtype,
            [&](auto type) { run<decltype(type), true>(op, p, s.sequences, complex, ctx); });
  if (!given(g.da) || !p.constant) return;
  const DiagonalSumParams q{part_params(s.sequences, kPartTokens), p.sums,
                            static_cast<float*>(g.da.data), p.columns,
                            static_cast<int>(ceil_div(p.columns, 32))};
  launch(op, ctx, sum_parts, s.sequences.count * q.groups, 32 * kSumWarps,
         32 * kSumWarps * sizeof(float), q);
}

}  // namespace memkernels::scan::cuda
