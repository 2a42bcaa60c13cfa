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
  const int64_t size = item_size(a.q.dtype);
  const int64_t state_bytes = c.num_chunks * c.heads * c.values * c.row * size;

  WalkParams walk_on{};
  walk_on.c = c;
  walk_on.initial_state = state_rows(a.initial_state);
  p.us = walk_on.us = ctx.allocate(ctx, numel(a.v) * size);
  p.states = walk_on.states = ctx.allocate(ctx, state_bytes);
  const float* transitions = nullptr;
  float* zs = nullptr;
  if (a.normalize) {
    zs = static_cast<float*>(ctx.allocate(ctx, c.num_chunks * c.heads * c.key_row * sizeof(float)));
    p.inverse = walk_on.inverse = normalizers(op, a, c, ctx, zs);
    walk_on.out = ctx.allocate(ctx, numel(a.v) * size);
  }
  walk(op, walk_on, false, a.q.dtype, transitions, ctx);
  if (a.normalize) {
    NormalizerGradParams n{};
    n.c = c;
    n.dout = g.dout.data;
    n.out = walk_on.out;
    n.inverse = p.inverse;
    n.dz = static_cast<const float*>(g.dz.data);
    n.dinitial_z = static_cast<float*>(g.dinitial_z.data);
    normalizer_gradients(op, n, a.q.dtype, ctx);
    p.dnormalizers = n.dnormalizers;
    p.zs = zs;
    p.dzs = n.dzs;
  }

  WalkParams walk_back{};
  walk_back.c = c;
  walk_back.inverse = p.inverse;
  walk_back.c.v = token_rows(g.dout);
  walk_back.c.v_aligned = aligned_to_16(g.dout);
  walk_back.initial_state = state_rows(g.dstate);
  walk_back.state = static_cast<float*>(g.dinitial_state.data);
  walk_back.out = g.dv.data;
  if (given(a.beta)) p.dus = walk_back.us = ctx.allocate(ctx, numel(a.v) * size);
  p.dstates = walk_back.states = ctx.allocate(ctx, state_bytes);
  walk(op, walk_back, true, a.q.dtype, transitions, ctx);

  p.dout = g.dout.data;
  p.dq = g.dq.data;
  p.dk = g.dk.data;
  p.dqk_is_float = (given(g.dq) ? g.dq : g.dk).dtype == Dtype::f32;
  p.dbeta = static_cast<float*>(g.dbeta.data);
  p.dg = static_cast<float*>(g.dg.data);
  chunk_gradients(op, p, a.q.dtype, ctx);
}

}  // namespace memkernels::scan::cuda
