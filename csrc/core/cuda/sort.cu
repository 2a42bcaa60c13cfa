#include "core/cuda/sort.h"

#include "core/cuda/launch.h"
#ifdef __CUDACC__
#include <cub/device/device_radix_sort.cuh>
#endif

namespace memkernels::cuda {

#ifdef __CUDACC__

void sort_by_key(const char* op, uint32_t*& keys, int*& values, int n, int bits,
                 const Context& ctx) {
  auto* const other_keys = static_cast<uint32_t*>(ctx.allocate(ctx, int64_t{n} * 4));
  auto* const other_values = static_cast<int*>(ctx.allocate(ctx, int64_t{n} * 4));
  cub::DoubleBuffer<uint32_t> key_buffers(keys, other_keys);
  cub::DoubleBuffer<int> value_buffers(values, other_values);
  const auto stream = static_cast<cudaStream_t>(ctx.stream);
  size_t bytes = 0;
  void* scratch = nullptr;
  for (int call = 0; call < 2; ++call) {  // the first tells how much scratch the second needs
    check_cuda(op, cub::DeviceRadixSort::SortPairs(scratch, bytes, key_buffers, value_buffers, n, 0,
                                                   bits, stream));
    if (call == 0) scratch = ctx.allocate(ctx, static_cast<int64_t>(bytes) + 1);
  }
  keys = key_buffers.Current();
  values = value_buffers.Current();
}

#endif

}  // namespace memkernels::cuda
