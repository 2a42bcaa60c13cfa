// What the CUDA kernels that write a paged cache read.
#pragma once

#include "attention/append_kv.h"
#include "attention/compact_kv.h"
#include "attention/copy_pages.h"
#include "core/cuda/launch.h"

namespace memkernels::attention::cuda {

using namespace memkernels::cuda;

inline constexpr int kCopyThreads = 128;
inline constexpr int kTokensOfBlock = 4;
inline constexpr int kCompactThreads = 512;
inline constexpr int kPasses = 8;  // tokens a thread holds at a time

// A cache; strides in bytes, rows in words.
struct CacheBytes {
  char* data;
  int64_t page_stride, token_stride, head_stride;
  int words;      // of a row
  int log_lanes;  // threads that copy a row: a power of two up to 32
};

struct NewTokens {
  const char* data;
  int64_t token_stride, head_stride;  // in bytes
};

struct AppendParams {
  CacheBytes caches[2];
  NewTokens tokens[2];
  Integers slots;
  int64_t page_size, num_slots;
  int heads;
};

struct CopyParams {
  CacheBytes caches[2];
  Integers pairs;
  int64_t side_stride, page_size, num_pages;
  int heads;
};

struct CompactParams {
  CacheBytes caches[2];
  int num_caches;  // 1 where the rows of one hold those of the other
  int heads, slices;
  Integers page_table, seq_lens, keep;
  int64_t table_row_stride, keep_sequence_stride, keep_head_stride;
  int64_t page_size, num_pages, max_pages, most;
  void* new_seq_lens;
  bool wide_lens;
};

}  // namespace memkernels::attention::cuda
