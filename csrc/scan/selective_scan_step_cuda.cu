#include "core/check.h"
#include "scan/selective_scan_step_kernel.cuh"

namespace memkernels::scan::cuda {

void selective_scan_step(const SelectiveScanStepArgs& a, const Context& ctx) {
  constexpr char op[] = "selective_scan_step";
  check_supported(op, "u", a.u);
  SelectiveStepParams p{};
  p.u = scan_rows(a.u);
  p.delta = scan_rows(a.delta);
  p.z = scan_rows(a.z);
  p.B = scan_rows(a.B);
  p.C = scan_rows(a.C);
  p.A = static_cast<const float*>(a.A.data);
  p.A_stride = a.A.stride[0];
  p.D = static_cast<const float*>(a.D.data);
  p.bias = static_cast<const float*>(a.delta_bias.data);
  p.dim = as_int(op, "channels", a.A.shape[0]);
  p.states = static_cast<int>(a.A.shape[1]);
  p.group_size = p.dim / static_cast<int>(a.B.shape[1]);
  p.softplus = a.delta_softplus;
  p.state = static_cast<float*>(a.state.data);
  p.state_stride = a.state.stride[0];
  p.slots = a.state.shape[0];
  p.state_indices = integers(a.state_indices);
  p.out = a.out.data;
  p.lanes = 1;
  while (p.lanes < 32 && p.lanes * kLaneStates < p.states) p.lanes *= 2;
  p.blocks = static_cast<int>(ceil_div(p.dim, kSelectiveStepThreads / p.lanes));
  const DeviceGuard guard(op, ctx.device);
  with_type(a.u.dtype, [&](auto type) {
    launch(op, ctx, step_channels<decltype(type)>, a.u.shape[0] * p.blocks, kSelectiveStepThreads,
           0, p);
  });
}

}  // namespace memkernels::scan::cuda
