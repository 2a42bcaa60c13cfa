#include <algorithm>

#include "core/check.h"
#include "scan/selective_scan_kernel.cuh"

namespace memkernels::scan::cuda {

SelectiveScanParams scan_params(const char* op, const SelectiveScanArgs& a) {
  check_supported(op, "u", a.u);
  SelectiveScanParams p{};
  p.parts = part_params(a.sequences, kScanPartTokens);
  p.rows = a.u.shape[0] * a.u.shape[1];
  p.u = scan_rows(a.u);
  p.delta = scan_rows(a.delta);
  p.z = scan_rows(a.z);
  p.B = scan_rows(a.B);
  p.C = scan_rows(a.C);
  p.A = static_cast<const float*>(a.A.data);
  p.A_stride = a.A.stride[0];
  p.D = static_cast<const float*>(a.D.data);
  p.bias = static_cast<const float*>(a.delta_bias.data);
  p.initial = scan_state_rows(a.initial_state);
  p.dim = as_int(op, "channels", a.A.shape[0]);
  p.states = static_cast<int>(a.A.shape[1]);
  p.groups = static_cast<int>(a.B.shape[2]);
  p.group_size = p.dim / p.groups;
  p.softplus = a.delta_softplus;
  p.state = static_cast<float*>(a.state.data);

  ScanThreads& t = p.threads;
  t.lane_bits = p.states <= 4 ? 0 : p.states <= 8 ? 1 : 2;
  t.slices = static_cast<int>(ceil_div(p.states, kSliceStates));
  t.channel_bits = 5 - t.lane_bits;
  t.channel_warps = 1;
  while (2 * t.channel_warps * t.slices <= kScanWarps && t.channels() < p.group_size) {
    t.channel_warps *= 2;
    ++t.channel_bits;
  }
  t.group_blocks = static_cast<int>(ceil_div(p.group_size, t.channels()));
  return p;
}

void selective_scan(const SelectiveScanArgs& a, const Context& ctx) {
  constexpr char op[] = "selective_scan";
  SelectiveScanParams p = scan_params(op, a);
  p.out = a.out.data;
  const int64_t sequences = a.sequences.count;
  if (sequences == 0) return;
  const ScanThreads& t = p.threads;
  const DeviceGuard guard(op, ctx.device);
  const Limits limits = limits_of(op, ctx.device);
  const int64_t blocks = int64_t{p.groups} * t.group_blocks, slots = p.parts.count;
  // The work of a second exponential, and of two more launches, must be worth it.
  const int64_t warps = sequences * blocks * t.count() / 32;
  const bool cut = warps < 4 * limits.multiprocessors && slots >= 16 * sequences;

  const int64_t tile_bytes = ScanTile<ScanInput>::bytes(t);
  const int64_t sums_bytes = kScanPartTokens * t.count() * int64_t{sizeof(float)};
  with_type(a.u.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t stage_bytes = Stage<T>::elements(t, p.z.data) * int64_t{sizeof(T)};
    const int64_t bytes = tile_bytes + sums_bytes + stage_bytes;
    const int stages = !cut && bytes + stage_bytes <= limits.of_block ? 2 : 1;
    if (cut) {
      const int64_t channels = slots * p.dim;
      p.carries = static_cast<float*>(ctx.allocate(ctx, channels * p.states * sizeof(float)));
      p.deltas = static_cast<float*>(ctx.allocate(ctx, channels * sizeof(float)));
      launch(op, ctx, scan_parts<T, false>, slots * blocks, t.count(), tile_bytes, p);
      launch(op, ctx, join_parts, ceil_div(sequences * p.dim * p.states, kJoinThreads),
             kJoinThreads, 0, p, false);
    }
    launch(op, ctx, scan_channels<T>, (cut ? slots : sequences) * blocks, t.count(),
           bytes + (stages - 1) * stage_bytes, p, stages);
  });
}

}  // namespace memkernels::scan::cuda
