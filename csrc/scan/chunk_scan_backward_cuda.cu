// The backward of the chunk engine: a walk to the end that keeps U and the states at the beginnings
// of chunks, a walk back that keeps their gradients, and then all chunks at once.
#include "scan/chunk_scan_cuda.h"

namespace memkernels::scan::cuda {

void chunk_scan_backward(const char* op, const ChunkScanArgs& a, const ChunkScanGrads& g,
                         const Sequences& sequences, const Context& ctx) {
  const DeviceGuard guard(op, ctx.device);
  ChunkGradParams p{};
  p.c = prepare(op, a, sequences, ctx);
  const ChunkParams& c = p.c;
  const Dtype dtype = a.q.dtype;
  const int64_t row_bytes = numel(a.v) * item_size(dtype);
  const int64_t state_bytes = c.num_chunks * c.heads * c.values * c.row * item_size(dtype);
  const bool of_chunks = given(g.dq) || given(g.dk) || given(g.dbeta) || given(g.dg);

  WalkParams on{};
  on.c = c;
  on.initial_state = state_rows(a.initial_state);
  NormalizerParams normalizer{c};
  if (a.normalize) {
    normalizers(op, normalizer, a, ctx);
    on.out = ctx.allocate(ctx, row_bytes);
  }
  p.inverse = on.inverse = normalizer.inverse;
  if (of_chunks) {
    p.us = on.us = ctx.allocate(ctx, row_bytes);
    p.states = on.states = ctx.allocate(ctx, state_bytes);
  }
  const float* transitions = nullptr;
  if (of_chunks || a.normalize) walk(op, on, false, dtype, &transitions, ctx);
  if (a.normalize) {
    NormalizerGradParams n{c, g.dout.data, on.out, p.inverse};
    normalizer_gradients(op, n, g, dtype, ctx);
    p.dnormalizers = n.dnormalizers;
    p.zs = normalizer.zs;
    p.dzs = n.dzs;
  }

  WalkParams back{};
  back.c = c;
  back.c.v = token_rows(g.dout);
  back.c.v_aligned = aligned_to_16(g.dout);
  back.inverse = p.inverse;
  back.initial_state = state_rows(g.dstate);
  back.state = static_cast<float*>(g.dinitial_state.data);
  back.out = g.dv.data;
  if (of_chunks) {
    if (given(a.beta)) p.dus = back.us = ctx.allocate(ctx, row_bytes);
    p.dstates = back.states = ctx.allocate(ctx, state_bytes);
  }
  walk(op, back, true, dtype, &transitions, ctx);
  if (!of_chunks) return;

  p.dout = g.dout.data;
  p.dq = g.dq.data;
  p.dk = g.dk.data;
  p.dqk_is_float = (given(g.dq) ? g.dq : g.dk).dtype == Dtype::f32;
  p.dbeta = static_cast<float*>(g.dbeta.data);
  p.dg = static_cast<float*>(g.dg.data);
  chunk_gradients(op, p, dtype, ctx);
}

}  // namespace memkernels::scan::cuda
