// A stable sort of choices by their memories, what goes to none behind: then the choice that comes
// to a row is known, so its token and, the other way round, the choice's row; a memory's rows begin
// where its number would be put in.
//
// Cost: 16 bytes written a choice, and the sort's 16 a byte of the largest number: small beside the
// rows of x, and a few launches for few tokens.
#pragma once

#include "core/cuda/device.cuh"
#include "scan/route_indices_cuda.h"

namespace memkernels::scan::cuda {

static __global__ void __launch_bounds__(kRouteThreads) list_choices(const RouteParams p) {
  const int64_t i = int64_t{blockIdx.x} * kRouteThreads + threadIdx.x;
  if (i >= p.rows) return;
  const auto entry = static_cast<int>(i);
  const int token = entry / p.choices, choice = entry % p.choices;
  const int64_t id = integer_at(p.ids, token * p.token_stride + choice * p.ids.stride);
  p.keys[entry] = static_cast<uint32_t>(id >= 0 && id < p.memories ? id : p.memories);
  p.entries[entry] = entry;
}

static __global__ void __launch_bounds__(kRouteThreads) route_choices(const RouteParams p) {
  const int64_t i = int64_t{blockIdx.x} * kRouteThreads + threadIdx.x;
  if (i < p.rows) {
    const int entry = p.entries[i];
    const bool routed = p.keys[i] < static_cast<uint32_t>(p.memories);
    p.order[i] = routed ? entry / p.choices : -1;
    p.inverse[entry] = routed ? i : -1;
  }
  if (i > int64_t{p.memories} + 1) return;
  int low = 0, high = p.rows;  // of the rows, the first whose memory is not before i
  while (low < high && i <= p.memories) {
    const int middle = low + (high - low) / 2;
    p.keys[middle] < i ? low = middle + 1 : high = middle;
  }
  p.cu_seqlens[i] = high;
}

}  // namespace memkernels::scan::cuda
