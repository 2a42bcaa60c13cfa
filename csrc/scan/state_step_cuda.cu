#include "scan/state_step.h"

#include <algorithm>

#include "scan/state_step_kernel.cuh"

namespace memkernels::scan::cuda {

namespace {

// Whether rows, or heads, begin at that many elements, or at 16 bytes.
bool heads_aligned(const TensorView& t, int64_t elements) {
  return is_aligned(t, 2, std::min<int64_t>(16, elements * item_size(t.dtype)));
}

StateStepParams params_of(const char* op, const StateStepArgs& a) {
  check_supported(op, "q", a.q);
  StateStepParams p{};
  p.q = a.q.data;
  p.k = a.k.data;
  p.v = a.v.data;
  p.beta = a.beta.data;
  p.g = a.g.data;
  copy_strides(a.q, p.q_strides);
  copy_strides(a.k, p.k_strides);
  copy_strides(a.v, p.v_strides);
  copy_strides(a.beta, p.beta_strides);
  copy_strides(a.g, p.g_strides);
  if (given(a.g) && a.g.ndim == 1) p.g_strides[0] = 0, p.g_strides[1] = a.g.stride[0];
  p.wide_beta = a.beta.dtype == Dtype::f32;
  p.wide_g = a.g.dtype == Dtype::f32;
  p.channels = a.g.ndim == 3;
  p.state = static_cast<float*>(a.state.data);
  p.z = static_cast<float*>(a.z.data);
  copy_strides(a.state, p.state_strides);
  copy_strides(a.z, p.z_strides);
  p.state_indices = integers(a.state_indices);
  p.slots = a.state.shape[0];
  p.heads = as_int(op, "heads", a.v.shape[1]);
  p.all_heads = as_int(op, "heads of all rows", a.v.shape[0] * a.v.shape[1]);
  p.group = p.heads / std::max(1, static_cast<int>(a.q.shape[1]));
  constexpr int kStep = kStepThreads * kStepRows;  // that loops may pass an end by
  p.keys = as_int(op, "rows of a state", a.k.shape[2] + kStep) - kStep;
  p.values = as_int(op, "columns of a state", a.v.shape[2] + kStep) - kStep;
  p.keys_aligned = heads_aligned(a.q, kStepRows) && heads_aligned(a.k, kStepRows) &&
                   (!p.channels || heads_aligned(a.g, kStepRows));
  p.qk_l2norm = a.qk_l2norm;
  p.scale = static_cast<float>(a.scale);
  p.eps = static_cast<float>(a.eps);
  p.out = a.out.data;
  return p;
}

}  // namespace

void state_step(const char* op, const StateStepArgs& a, const Context& ctx) {
  StateStepParams p = params_of(op, a);
  if (p.all_heads == 0) return;
  const bool columns_aligned =
      p.values % kStepColumns == 0 && heads_aligned(a.state, kStepColumns) &&
      heads_aligned(a.v, kStepColumns) && heads_aligned(a.out, kStepColumns);
  const DeviceGuard guard(op, ctx.device);
  if (given(a.z)) {
    p.factors = static_cast<float*>(ctx.allocate(ctx, p.all_heads * sizeof(float)));
    with_type(a.q.dtype, [&](auto type) {
      launch(op, ctx, step_normalisers<decltype(type)>, ceil_div(p.all_heads, kStepThreads / 32),
             kStepThreads, 0, p);
    });
  }
  if (p.values == 0) return;

  // Narrow tiles only where wide ones would leave multiprocessors idle: 32 bytes of a row are the
  // least that memory moves.
  const int64_t enough = 2 * limits_of(op, ctx.device).multiprocessors;
  constexpr int kLeastLanes = 2, kMostLanes = 8;
  p.classes = 1;
  while (p.classes * kLeastLanes < kStepThreads && p.classes * kStepRows < p.keys) p.classes *= 2;
  p.lanes = std::min(kMostLanes, kStepThreads / p.classes);
  const auto count_tiles = [&] {
    p.pieces = static_cast<int>(ceil_div(p.values, int64_t{p.lanes} * kStepColumns));
    return int64_t{p.all_heads} * p.pieces;
  };
  while (p.lanes > kLeastLanes &&
         (p.lanes * kStepColumns / 2 >= p.values || count_tiles() < enough)) {
    p.lanes /= 2;
  }
  p.tiles = as_int(op, "tiles of all states", count_tiles() + kStepThreads) - kStepThreads;
  int threads = kStepThreads;
  const int tile_threads = p.lanes * p.classes;
  const auto blocks = [&] { return ceil_div(p.tiles, threads / tile_threads); };
  while (threads > std::max(32, tile_threads) && blocks() < enough) threads /= 2;

  with_type(a.q.dtype, [&](auto type) {
    using T = decltype(type);
    launch(op, ctx, columns_aligned ? step_states<T, true> : step_states<T, false>, blocks(),
           threads, threads / 32 * p.lanes * sizeof(StepSums), p);
  });
}

}  // namespace memkernels::scan::cuda
