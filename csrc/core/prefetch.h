// Asks memory for a line that is read later.
#pragma once

namespace memkernels {
namespace {

// Into the second-level cache: on its way into the first, a line holds one of the few buffers for
// misses there until memory answers, and loads and the hardware's own prefetching wait for those.
inline __attribute__((always_inline)) void prefetch_line(const void* address) {
  __builtin_prefetch(address, 0, 2);
}

}  // namespace
}  // namespace memkernels
