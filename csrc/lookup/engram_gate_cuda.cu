#include "lookup/engram_gate.h"

#include <algorithm>
#include <cmath>

#include "lookup/engram_gate_kernel.cuh"

namespace memkernels::lookup::cuda {

namespace {

// Whether each row begins at 16 bytes.
bool aligned(const TensorView& t) { return is_aligned(t, t.ndim - 1, 16); }

bool inputs_aligned(const EngramGateArgs& a) {
  return aligned(a.hidden) && aligned(a.k) && aligned(a.v) && aligned(a.weight) &&
         a.hidden.shape[2] * item_size(a.hidden.dtype) % 16 == 0;
}

GateParams params_of(const char* op, const EngramGateArgs& a) {
  check_supported(op, "hidden", a.hidden);
  GateParams p{};
  p.hidden = a.hidden.data;
  p.k = a.k.data;
  p.v = a.v.data;
  p.weight = a.weight.data;
  for (int i = 0; i < 2; ++i) {
    p.hidden_strides[i] = a.hidden.stride[i];
    p.k_strides[i] = a.k.stride[i];
  }
  p.v_stride = a.v.stride[0];
  p.weight_stride = a.weight.stride[0];
  p.wide_weight = a.weight.dtype == Dtype::f32;
  p.copy_sign = a.sign == ZeroSign::copy;
  p.tokens = a.hidden.shape[0];
  p.channels = as_int(op, "channels", a.hidden.shape[1]);
  p.dim = static_cast<int>(a.hidden.shape[2]);
  as_int(op, "columns", a.hidden.shape[2] + 16 * kGateThreads);  // where loops may end
  p.eps = static_cast<float>(a.eps);
  p.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(p.dim)));
  return p;
}

}  // namespace

void engram_gate(const EngramGateArgs& a, const Context& ctx) {
  constexpr char op[] = "engram_gate";
  GateParams p = params_of(op, a);
  p.out = a.out.data;
  const bool all_aligned = inputs_aligned(a) && aligned(a.out);
  // 16 bytes a lane, twice.
  const int64_t row_bytes = p.dim * item_size(a.hidden.dtype);
  p.row_warps = 1;
  while (p.row_warps < kGateWarps && row_bytes > 1024 * p.row_warps) p.row_warps *= 2;
  const DeviceGuard guard(op, ctx.device);
  const int64_t blocks = ceil_div(p.tokens * p.channels, kGateWarps / p.row_warps);
  with_type(a.hidden.dtype, [&](auto type) {
    using T = decltype(type);
    launch(op, ctx, all_aligned ? gate<T, true> : gate<T, false>, blocks, kGateThreads,
           kGateWarps * 3 * sizeof(float), p);
  });
}

void engram_gate_backward(const EngramGateArgs& a, const EngramGateGrads& g, const Context& ctx) {
  constexpr char op[] = "engram_gate_backward";
  GateParams p = params_of(op, a);
  check(p.channels <= kGateChannels, op, "hidden has ", p.channels,
        " channels; supported on CUDA: up to ", kGateChannels);
  p.dout = g.dout.data;
  p.dout_strides[0] = g.dout.stride[0];
  p.dout_strides[1] = g.dout.stride[1];
  p.dhidden = g.dhidden.data;
  p.dk = g.dk.data;
  p.dv = g.dv.data;
  const bool all_aligned =
      inputs_aligned(a) && aligned(g.dout) && aligned(g.dhidden) && aligned(g.dk) && aligned(g.dv);
  p.row_warps = kGateWarps;  // all channels at once
  while (p.row_warps > 1 && p.row_warps * p.channels > kGateWarps) p.row_warps /= 2;

  const DeviceGuard guard(op, ctx.device);
  const int64_t weights = int64_t{p.channels} * p.dim;
  int64_t shared_bytes = p.channels * (p.row_warps * 4 * sizeof(float) + sizeof(Closing));
  p.block_tokens = 1;
  int64_t blocks = p.tokens;
  if (given(g.dweight)) {
    p.block_tokens = std::max<int64_t>(1, ceil_div(p.tokens, kGateParts));
    blocks = ceil_div(p.tokens, p.block_tokens);
    p.parts = static_cast<float*>(ctx.allocate(ctx, blocks * weights * sizeof(float)));
    // Where two blocks find room.
    const int64_t whole = shared_bytes + weights * sizeof(float);
    p.parts_in_shared =
        p.block_tokens > 1 && 2 * (whole + 1024) <= limits_of(op, ctx.device).of_multiprocessor;
    if (p.parts_in_shared) shared_bytes = whole;
  }
  with_type(a.hidden.dtype, [&](auto type) {
    using T = decltype(type);
    launch(op, ctx, all_aligned ? gate_backward<T, true> : gate_backward<T, false>, blocks,
           kGateThreads, shared_bytes, p);
  });
  if (!given(g.dweight)) return;
  with_type(a.weight.dtype, [&](auto type) {
    const GatePartsParams parts{p.parts, static_cast<int>(blocks), weights, g.dweight.data};
    launch(op, ctx, add_gate_parts<decltype(type)>, ceil_div(weights, 32), kGateThreads,
           kGateThreads * sizeof(float), parts);
  });
}

}  // namespace memkernels::lookup::cuda
