// How the keys of a sequence are cut into stretches that tasks pack, and its queries into blocks.
#pragma once

#include <stdint.h>

namespace memkernels::selection {
namespace {

// Keys of a stretch, whole blocks of 64: packed, they stay in L2.
constexpr int64_t stretch_keys(int64_t dim) {
  const int64_t fit = 65536 / dim / 64 * 64;
  return fit < 64 ? 64 : fit > 1024 ? 1024 : fit;
}

// Queries that are packed at a time: some 96 rows, unless one query has more heads.
constexpr int64_t block_queries(int64_t group) { return group < 96 ? 96 / group : 1; }

}  // namespace
}  // namespace memkernels::selection
