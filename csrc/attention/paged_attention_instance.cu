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
  if (rows == 16) {
    launch(op, ctx, attend<T, kDim, 16>, blocks, Shape<T, kDim, 16>::kThreads, shared_bytes, p);
  } else {
    launch(op, ctx, attend<T, kDim, 64>, blocks, Shape<T, kDim, 64>::kThreads, shared_bytes, p);
  }
  if (p.splits == 1) return;
  const int64_t num_rows = int64_t{p.num_sequences} * p.partial_queries * p.num_heads;
  launch(op, ctx, merge_splits<T>, ceil_div(num_rows, 4), 128, 0, p, num_rows);
}

}  // namespace memkernels::attention::cuda
