// A worker's scratch memory.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace memkernels {
namespace {

// Hands out pieces of it; with a null base it only counts.
struct Arena {
  char* base;
  size_t used = 0;
  template <class X>
  X* take(int64_t n) {
    X* out = reinterpret_cast<X*>(base + used);
    used += (n * sizeof(X) + 63) / 64 * 64;
    return out;
  }
};

}  // namespace
}  // namespace memkernels
