#include "scan/causal_conv1d.h"

#include <algorithm>

#include "scan/causal_conv1d_kernel.cuh"

namespace memkernels::scan::cuda {

namespace {

// Whether rows begin at multiples of that many elements.
bool rows_aligned(const TensorView& t, int elements) {
  return is_aligned(t, t.ndim - 1, elements * item_size(t.dtype));
}

ConvParams params_of(const char* op, const CausalConvArgs& a) {
  check_supported(op, "x", a.x);
  ConvParams p{};
  p.x = a.x.data;
  p.weight = a.weight.data;
  p.bias = a.bias.data;
  p.initial_state = a.initial_state.data;
  copy_strides(a.x, p.x_strides);
  copy_strides(a.initial_state, p.initial_strides);
  p.weight_stride = a.weight.stride[0];
  p.bias_stride = a.bias.stride[0];
  p.wide_weight = a.weight.dtype == Dtype::f32;
  p.silu = a.activation == ConvActivation::silu;
  constexpr int kMostChannels = 256;  // of a warp
  p.channels = as_int(op, "channels", a.x.shape[2] + kMostChannels) - kMostChannels;
  p.taps = static_cast<int>(a.weight.shape[1]);
  p.dilation = p.taps > 1 ? a.dilation : 1;
  p.state_length = (p.taps - 1) * p.dilation;
  p.x_step = p.dilation * p.x_strides[1];
  p.out_step = p.dilation * p.channels;
  return p;
}

// Long runs read few tokens twice; there should be enough of them for all multiprocessors.
void set_runs(ConvParams& p, const Sequences& sequences, int elements, int64_t longest,
              int64_t least, int64_t wanted) {
  p.groups = static_cast<int>(ceil_div(p.channels, 32 * elements));
  p.tile_runs = p.dilation <= kConvPhases ? p.dilation : 1;
  for (int64_t tokens = longest;; tokens /= 2) {
    p.tiles = part_params(sequences, tokens * p.tile_runs);
    p.num_runs = p.tiles.count * p.tile_runs;
    if (tokens <= least || p.num_runs * p.groups >= wanted) return;
  }
}

int64_t wanted_warps(const char* op, const Context& ctx) {
  return 32 * int64_t{limits_of(op, ctx.device).multiprocessors};
}

int64_t state_blocks(const ConvParams& p) {
  return ceil_div(p.tiles.sequences.count * p.state_length * p.channels, kConvThreads);
}

}  // namespace

void causal_conv1d(const CausalConvArgs& a, const Sequences& sequences, const Context& ctx) {
  constexpr char op[] = "causal_conv1d";
  ConvParams p = params_of(op, a);
  p.out = a.out.data;
  p.state = a.state.data;
  const auto aligned = [&](int elements) {
    return p.channels % elements == 0 && rows_aligned(a.x, elements) &&
           rows_aligned(a.out, elements);
  };
  const DeviceGuard guard(op, ctx.device);
  with_type(a.x.dtype, [&](auto type) {
    using T = decltype(type);
    const auto run = [&](auto kernel, int elements) {
      set_runs(p, sequences, elements, 64, 4, wanted_warps(op, ctx));
      launch(op, ctx, kernel, ceil_div(p.num_runs, kConvWarps) * p.groups, kConvThreads, 0, p);
    };
    constexpr int kWide = 16 / sizeof(T);
    if (p.taps <= 4 && aligned(kWide)) {
      run(convolve<T, 4, kWide>, kWide);
    } else if (aligned(4)) {
      run(convolve<T, 16, 4>, 4);
    } else {
      run(convolve<T, 16, 1>, 1);
    }
    if (given(a.state)) {
      launch(op, ctx, final_conv_states<T>, state_blocks(p), kConvThreads, 0, p);
    }
  });
}

void causal_conv1d_backward(const CausalConvArgs& a, const CausalConvGrads& g,
                            const Sequences& sequences, const Context& ctx) {
  constexpr char op[] = "causal_conv1d_backward";
  ConvParams p = params_of(op, a);
  p.dout = g.dout.data;
  p.dstate = g.dstate.data;
  copy_strides(g.dout, p.dout_strides);
  copy_strides(g.dstate, p.dstate_strides);
  p.dout_step = p.dilation * p.dout_strides[1];
  p.dx = g.dx.data;
  p.dinitial_state = g.dinitial_state.data;
  const auto aligned = [&](int elements) {
    return p.channels % elements == 0 && rows_aligned(a.x, elements) &&
           rows_aligned(g.dout, elements) && rows_aligned(g.dx, elements);
  };
  const bool sums = given(g.dweight) || given(g.dbias);
  const DeviceGuard guard(op, ctx.device);
  with_type(a.x.dtype, [&](auto type) {
    using T = decltype(type);
    const auto run = [&](auto kernel, int elements, int taps) {
      constexpr int64_t kLeastParts = 16;
      const int64_t groups = ceil_div(p.channels, 32 * elements);
      const int64_t most =
          std::max(kLeastParts, ceil_div(2 * wanted_warps(op, ctx), kConvBackwardWarps * groups));
      set_runs(p, sequences, elements, 64, 8, most * kConvBackwardWarps * groups);
      p.warp_runs = std::max<int64_t>(1, ceil_div(p.num_runs, most * kConvBackwardWarps));
      const int64_t parts = ceil_div(p.num_runs, kConvBackwardWarps * p.warp_runs);
      const int64_t numbers = int64_t{p.taps + 1} * p.channels;
      if (sums) p.parts = static_cast<float*>(ctx.allocate(ctx, parts * numbers * sizeof(float)));
      const int64_t shared_bytes = kConvBackwardThreads * elements * (taps + 1) * sizeof(float);
      if (sums || given(g.dx)) {
        launch(op, ctx, kernel, parts * p.groups, kConvBackwardThreads, shared_bytes, p);
      }
      if (!sums) return;
      const ConvPartsParams q{p.parts,
                              parts,
                              p.channels,
                              p.taps,
                              static_cast<float*>(g.dweight.data),
                              static_cast<float*>(g.dbias.data)};
      launch(op, ctx, add_conv_parts, ceil_div(numbers, 32), kAddThreads, kAddBytes, q);
    };
    if (p.taps <= 4 && aligned(4)) {
      run(convolve_backward<T, 4, 4>, 4, 4);
    } else if (aligned(2)) {
      run(convolve_backward<T, 16, 2>, 2, 16);
    } else {
      run(convolve_backward<T, 16, 1>, 1, 16);
    }
    if (given(g.dinitial_state)) {
      launch(op, ctx, initial_conv_gradients<T>, state_blocks(p), kConvThreads, 0, p);
    }
  });
}

void causal_conv1d_step(const CausalConvStepArgs& a, const Context& ctx) {
  constexpr char op[] = "causal_conv1d_step";
  check_supported(op, "x", a.x);
  ConvStepParams p{};
  p.x = a.x.data;
  p.weight = a.weight.data;
  p.bias = a.bias.data;
  p.x_stride = a.x.stride[0];
  p.weight_stride = a.weight.stride[0];
  p.bias_stride = a.bias.stride[0];
  p.wide_weight = a.weight.dtype == Dtype::f32;
  p.silu = a.activation == ConvActivation::silu;
  p.state = a.state.data;
  p.state_stride = a.state.stride[0];
  p.slots = a.state.shape[0];
  p.state_indices = integers(a.state_indices);
  p.rows = a.x.shape[0];
  p.channels = a.x.shape[1];
  p.taps = static_cast<int>(a.weight.shape[1]);
  p.dilation = a.dilation;
  p.state_length = a.state.shape[2];
  p.out = a.out.data;
  const DeviceGuard guard(op, ctx.device);
  with_type(a.x.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kWide = 16 / sizeof(T);
    const bool wide = p.taps == 4 && p.dilation == 1 && p.channels % kWide == 0 &&
                      rows_aligned(a.x, kWide) && p.state_stride % kWide == 0 &&
                      reinterpret_cast<uintptr_t>(p.state) % 16 == 0;
    const int64_t threads = p.rows * p.channels / (wide ? kWide : 1);
    launch(op, ctx, wide ? step_4_taps<T> : step_taps<T>, ceil_div(threads, kConvThreads),
           kConvThreads, 0, p);
  });
}

}  // namespace memkernels::scan::cuda
