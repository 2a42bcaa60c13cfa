// What the ops that write a paged cache share: its checks, and rows of heads in it.
#pragma once

#include "core/tensor.h"

namespace memkernels::attention {

// Refuses caches that are not [num_pages, page_size, Hkv, D] and [num_pages, page_size, Hkv, Dv].
void check_caches(const char* op, const TensorView& k_cache, const TensorView& v_cache);

// The caches to move: one of them alone where its rows hold those of the other. Refuses rows that
// overlap in part.
struct DistinctCaches {
  int count;
  const TensorView* cache[2];
};
DistinctCaches distinct_caches(const char* op, const TensorView& k_cache,
                               const TensorView& v_cache);

// The heads of one token; strides and rows in bytes.
struct TokenHeads {
  char* data;
  int64_t head_stride;
};

// `row` bytes of each of `heads` heads.
void copy_heads(const TokenHeads& from, const TokenHeads& to, int64_t heads, int64_t row);

}  // namespace memkernels::attention
