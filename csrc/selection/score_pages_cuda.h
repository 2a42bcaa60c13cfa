// What the CUDA kernel of score_pages reads.
#pragma once

#include "core/cuda/launch.h"
#include "selection/score_pages.h"

namespace memkernels::selection::cuda {

using namespace memkernels::cuda;

inline constexpr int kScoreWarps = 8;
inline constexpr int kWarpPages = 16;
inline constexpr int kBlockPages = kScoreWarps * kWarpPages;

struct ScoreParams {
  const void* q;  // [total_q, Hq, D]
  Dtype q_dtype;
  int64_t q_stride, q_head_stride;
  const void* summary;  // [num_pages, Hkv, width]
  int64_t page_stride, head_stride;
  bool aligned;  // summaries can be read by 16 bytes
  Integers page_table, seq_lens, cu_seqlens_q;
  int64_t table_row_stride;
  int num_sequences, total_q, kv_heads, group, dim, width;
  int64_t num_pages, max_pages, page_size;
  bool minmax, causal;
  GroupReduce reduce;
  float scale;
  int queries;     // of a block
  int page_tiles;  // of kBlockPages
  float* scores;   // [total_q, Hkv, max_pages]
};

}  // namespace memkernels::selection::cuda
