#include "scan/chunk_gradients_kernel.cuh"
#include "scan/chunk_normalizer_kernel.cuh"

namespace memkernels::scan::cuda {

void normalizer_gradients(const char* op, NormalizerGradParams& p, Dtype dtype,
                          const Context& ctx) {
  const ChunkParams& c = p.c;
  const int64_t units = c.num_chunks * c.heads;
  with_shape(dtype, c.keys, [&](auto type, auto dim) {
    using T = decltype(type);
    constexpr int kTokens = chunk_tokens(sizeof(T), dim);
    const auto allocate = [&](int64_t count) {
      return static_cast<float*>(ctx.allocate(ctx, units * count * sizeof(float)));
    };
    p.dnormalizers = allocate(kTokens);
    p.dzs = allocate(c.key_row);
    launch(op, ctx, find_dnormalizers<T, kTokens>, units, kNormalizerThreads,
           kTokens * sizeof(float), p);
    launch(op, ctx, walk_dz<kTokens>, c.sequences.count * c.heads, kNormalizerThreads, 0, p);
  });
}

void chunk_gradients(const char* op, ChunkGradParams& p, Dtype dtype, const Context& ctx) {
  const ChunkParams& c = p.c;
  const auto address = reinterpret_cast<uintptr_t>(p.dout) | reinterpret_cast<uintptr_t>(p.us) |
                       reinterpret_cast<uintptr_t>(p.dus);
  p.aligned = (address | c.values * item_size(dtype)) % 16 == 0;
  if (c.channels) return channel_gradients(op, p, dtype, ctx);
  with_shape(dtype, c.keys, [&](auto type, auto dim) {
    launch_gradients<decltype(type), dim, false>(op, p, ctx);
  });
}

}  // namespace memkernels::scan::cuda
