#include "scan/chunk_normalizer_kernel.cuh"

namespace memkernels::scan::cuda {

void normalizers(const char* op, NormalizerParams& p, const ChunkScanArgs& a, const Context& ctx) {
  const ChunkParams& c = p.c;
  p.eps = static_cast<float>(a.eps);
  const int64_t units = c.num_chunks * c.heads;
  with_shape(a.q.dtype, c.keys, [&](auto type, auto dim) {
    using T = decltype(type);
    constexpr int kTokens = chunk_tokens(sizeof(T), dim);
    p.zs = static_cast<float*>(ctx.allocate(ctx, units * c.key_row * sizeof(float)));
    p.inverse = static_cast<float*>(ctx.allocate(ctx, units * kTokens * sizeof(float)));
    launch(op, ctx, add_keys<T, kTokens>, units, kNormalizerThreads, 0, p);
    const ZWalkParams walk{c, false, state_rows(a.initial_z), p.zs, static_cast<float*>(a.z.data)};
    launch(op, ctx, walk_z<kTokens>, c.sequences.count * c.heads, kNormalizerThreads, 0, walk);
    launch(op, ctx, find_normalizers<T, kTokens>, units, kNormalizerThreads, 0, p);
  });
}

void normalizer_gradients(const char* op, NormalizerGradParams& p, const ChunkScanGrads& grads,
                          Dtype dtype, const Context& ctx) {
  const ChunkParams& c = p.c;
  const int64_t units = c.num_chunks * c.heads;
  with_shape(dtype, c.keys, [&](auto type, auto dim) {
    using T = decltype(type);
    constexpr int kTokens = chunk_tokens(sizeof(T), dim);
    p.dnormalizers = static_cast<float*>(ctx.allocate(ctx, units * kTokens * sizeof(float)));
    p.dzs = static_cast<float*>(ctx.allocate(ctx, units * c.key_row * sizeof(float)));
    launch(op, ctx, find_dnormalizers<T, kTokens>, units, kNormalizerThreads,
           kTokens * sizeof(float), p);
    const ZWalkParams walk{c, true, state_rows(grads.dz), p.dzs,
                           static_cast<float*>(grads.dinitial_z.data)};
    launch(op, ctx, walk_z<kTokens>, c.sequences.count * c.heads, kNormalizerThreads, 0, walk);
  });
}

}  // namespace memkernels::scan::cuda
