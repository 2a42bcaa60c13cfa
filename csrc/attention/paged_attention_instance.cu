// The kernels of one dtype and head dimension: compiled once for each, MEMKERNELS_TYPE and
// MEMKERNELS_DIM given by the build.
#include "attention/paged_attention_kernel.cuh"

namespace memkernels::attention::cuda {

template <>
void launch_attention<MEMKERNELS_TYPE, MEMKERNELS_DIM>(const char* op, const AttentionParams& p,
                                                       int rows, int64_t blocks,
                                                       int64_t shared_bytes, const Context& ctx) {
  using T = MEMKERNELS_TYPE;
  constexpr int kDim = MEMKERNELS_DIM;
  const auto run = [&](auto kernel, int threads) {
    launch(op, ctx, kernel, blocks, threads, shared_bytes, p);
  };
  if (rows == 16) {
    run(attend<T, kDim, 16>, Shape<T, kDim, 16>::kThreads);
  } else if (rows == 64 || !has_large_blocks(sizeof(T), kDim)) {
    run(attend<T, kDim, 64>, Shape<T, kDim, 64>::kThreads);
  } else if constexpr (has_large_blocks(sizeof(T), kDim)) {
    run(attend<T, kDim, 128>, Shape<T, kDim, 128>::kThreads);
  }
}

}  // namespace memkernels::attention::cuda
