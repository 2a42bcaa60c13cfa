#include "attention/merge_states_kernel.cuh"
#include "core/cuda/launch.h"

namespace memkernels::attention::cuda {

namespace {

template <class T>
void run(const char* op, const MergeParams& p, const Context& ctx) {
  launch(op, ctx, p.dout ? merge_backward<T> : merge<T>, ceil_div(p.rows, kMergeRows),
         32 * kMergeRows, 0, p);
}

void run(const char* op, const TensorView& outs, const MergeParams& p, const Context& ctx) {
  check_supported(op, "outs", outs);
  const DeviceGuard guard(op, ctx.device);
  with_type(outs.dtype, [&](auto type) { run<decltype(type)>(op, p, ctx); });
}

MergeParams params_of(const MergeStatesArgs& a) {
  MergeParams p{};
  p.outs = a.outs.data;
  p.lses = static_cast<const float*>(a.lses.data);
  for (int i = 0; i < 3; ++i) {
    p.out_strides[i] = a.outs.stride[i];
    p.lse_strides[i] = a.lses.stride[i];
  }
  p.out = a.out.data;
  p.lse = static_cast<float*>(a.lse.data);
  p.parts = static_cast<int>(a.outs.shape[0]);
  p.rows = a.outs.shape[1] * a.outs.shape[2];
  p.heads = static_cast<int>(a.outs.shape[2]);
  p.dim = static_cast<int>(a.outs.shape[3]);
  return p;
}

}  // namespace

void merge_states(const MergeStatesArgs& a, const Context& ctx) {
  run("merge_states", a.outs, params_of(a), ctx);
}

void merge_states_backward(const MergeStatesArgs& a, const MergeStatesGrads& g,
                           const Context& ctx) {
  MergeParams p = params_of(a);
  p.dout = g.dout.data;
  p.dlse = static_cast<const float*>(g.dlse.data);
  p.douts = g.douts.data;
  p.dlses = static_cast<float*>(g.dlses.data);
  run("merge_states_backward", a.outs, p, ctx);
}

}  // namespace memkernels::attention::cuda
