// What the CUDA kernels of summarize_keys and update_summaries read.
#pragma once

#include "core/cuda/launch.h"

namespace memkernels::selection::cuda {

using namespace memkernels::cuda;

inline constexpr int kSummaryThreads = 128;

struct SummarizeParams {
  const void* k;  // [num_pages, page_size, Hkv, D]
  int64_t page_stride, token_stride, head_stride;
  Integers page_table, seq_lens, num_new;
  int64_t table_row_stride, num_new_all;
  int64_t num_pages, page_size, max_pages;
  int num_entries;  // of the page table
  int heads, dim;
  bool minmax;
  void* summary;  // [num_pages, Hkv, 2, D], or for means [num_pages, Hkv, D] float32
  int* fills;     // [num_pages], zeroed: how many tokens are in use
  // Of an update, else null: [num_pages], zeroed: 1 + the last entry of the page table that names
  // the page and holds new tokens.
  int* claims;
  // Blocks of an update are entries that may hold new tokens, so many of each sequence; or, if this
  // is 0, as of a summary, pages.
  int64_t most_new_pages;
};

}  // namespace memkernels::selection::cuda
