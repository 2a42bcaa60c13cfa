// The backward kernels of one dtype and head dimension: compiled once for each, MEMKERNELS_TYPE and
// MEMKERNELS_DIM given by the build.
#include "attention/paged_attention_backward_kernel.cuh"

namespace memkernels::attention::cuda {

template <>
void launch_dq<MEMKERNELS_TYPE, MEMKERNELS_DIM>(const char* op, const BackwardParams& p,
                                                int64_t blocks, int64_t shared_bytes,
                                                const Context& ctx) {
  launch(op, ctx, find_dq<MEMKERNELS_TYPE, MEMKERNELS_DIM>, blocks,
         QueryShape<MEMKERNELS_TYPE, MEMKERNELS_DIM>::kThreads, shared_bytes, p);
}

template <>
void launch_dkv<MEMKERNELS_TYPE, MEMKERNELS_DIM>(const char* op, const BackwardParams& p, int keys,
                                                 int64_t blocks, int64_t shared_bytes,
                                                 const Context& ctx) {
  using T = MEMKERNELS_TYPE;
  constexpr int kDim = MEMKERNELS_DIM;
  if constexpr (has_64_keys(sizeof(T), kDim)) {
    if (keys == 64) {
      return launch(op, ctx, find_dkv<T, kDim, 64>, blocks, KeyShape<T, kDim, 64>::kThreads,
                    shared_bytes, p);
    }
  }
  launch(op, ctx, find_dkv<T, kDim, 16>, blocks, KeyShape<T, kDim, 16>::kThreads, shared_bytes, p);
}

}  // namespace memkernels::attention::cuda
