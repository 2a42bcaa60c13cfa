#include <algorithm>

#include "core/check.h"
#include "scan/selective_scan_backward_kernel.cuh"

namespace memkernels::scan::cuda {

void selective_scan_backward(const SelectiveScanArgs& a, const SelectiveScanGrads& g,
                             const Context& ctx) {
  constexpr char op[] = "selective_scan_backward";
  SelectiveScanParams p = scan_params(op, a);
  p.dout = scan_rows(g.dout);
  p.dstate = scan_state_rows(g.dstate);
  p.du = g.du.data;
  p.ddelta = g.ddelta.data;
  p.dz = g.dz.data;
  p.dinitial = static_cast<float*>(g.dinitial_state.data);
  p.wants_dA = given(g.dA);
  p.wants_dD = given(g.dD);
  p.wants_dbias = given(g.ddelta_bias);
  // How the channels of a group are added up depends on their number and that of states alone.
  constexpr int kMostRuns = 16;
  const ScanThreads& t = p.threads;
  p.runs = std::min(kMostRuns, t.group_blocks);

  const DeviceGuard guard(op, ctx.device);
  const int64_t slots = p.parts.count, states = int64_t{p.dim} * p.states;
  const auto allocate = [&](int64_t numbers) {
    return static_cast<float*>(ctx.allocate(ctx, numbers * sizeof(float)));
  };
  p.carries = allocate(slots * states);
  p.grads = allocate(slots * states);
  p.deltas = allocate(slots * p.dim);
  if (p.wants_dD) p.dD = allocate(slots * p.dim);
  if (given(g.dB)) p.dB = allocate(p.runs * numel(a.B));
  if (given(g.dC)) p.dC = allocate(p.runs * numel(a.C));
  with_type(a.u.dtype, [&](auto type) {
    using T = decltype(type);
    launch(op, ctx, scan_parts<T, true>, slots * p.groups * t.group_blocks, t.count(),
           ScanTile<ScanInputAndGrad>::bytes(t), p);
    launch(op, ctx, join_parts, ceil_div(2 * a.sequences.count * states, kJoinThreads),
           kJoinThreads, 0, p, true);
    launch(op, ctx, scan_backward<T>, slots * p.groups * p.runs, t.count(),
           BackwardMemory::bytes(t), p);
  });
  const auto add = [&](const float* parts, int64_t num_parts, const TensorView& to) {
    if (!given(to)) return;
    with_type(to.dtype, [&](auto type) {
      launch(op, ctx, add_scan_parts<decltype(type)>, ceil_div(numel(to), 32), kAddThreads,
             kAddBytes, parts, num_parts, numel(to), to.data);
    });
  };
  add(p.carries, slots, g.dA);
  add(p.dD, slots, g.dD);
  add(p.deltas, slots, g.ddelta_bias);
  add(p.dB, p.runs, g.dB);
  add(p.dC, p.runs, g.dC);
}

}  // namespace memkernels::scan::cuda
