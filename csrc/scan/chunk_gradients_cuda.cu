#include "scan/chunk_gradients_kernel.cuh"

namespace memkernels::scan::cuda {

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
