// How the keys of a sequence are cut into stretches that tasks pack.
#pragma once

#include <stdint.h>

namespace memkernels::selection {

// Keys of a stretch, whole blocks of 64: packed, they stay in L2.
inline constexpr int64_t stretch_keys(int64_t dim) {
  const int64_t fit = 65536 / dim / 64 * 64;
  return fit < 64 ? 64 : fit > 1024 ? 1024 : fit;
}

}  // namespace memkernels::selection
