// Sorting on the device.
#pragma once

#include "core/context.h"

namespace memkernels::cuda {

// Sorts n values by their keys, of which the lowest `bits` count; equal keys keep their order. The
// result is in keys and values, whose memory is the context's.
void sort_by_key(const char* op, uint32_t*& keys, int*& values, int n, int bits,
                 const Context& ctx);

}  // namespace memkernels::cuda
