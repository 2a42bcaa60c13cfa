#include "scan/chunk_gradients_channels_kernel.cuh"

namespace memkernels::scan::cuda {

void channel_gradients(const char* op, ChunkGradParams& p, Dtype dtype, const Context& ctx) {
  with_shape(dtype, p.c.keys, [&](auto type, auto dim) {
    using T = decltype(type);
    p.channel_bytes = ChannelMemory<T, dim>(nullptr, p.c).bytes;
    launch_gradients<T, dim, true>(op, p, ctx);
  });
}

}  // namespace memkernels::scan::cuda
