// What the CUDA kernels of route_indices read.
#pragma once

#include "core/cuda/launch.h"

namespace memkernels::scan::cuda {

using namespace memkernels::cuda;

inline constexpr int kRouteThreads = 256;

struct RouteParams {
  Integers ids;  // [T, r]
  int64_t token_stride;
  int choices, rows, memories;  // r, T r, M
  uint32_t* keys;               // [T r]
  int* entries;                 // [T r]
  int64_t *order, *inverse;     // [T r], [T, r]
  int* cu_seqlens;              // [M + 2]
};

}  // namespace memkernels::scan::cuda
