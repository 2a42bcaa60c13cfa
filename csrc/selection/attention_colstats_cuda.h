// What the CUDA kernel of attention_colstats reads.
#pragma once

#include "attention/paged_attention_cuda.h"
#include "selection/attention_colstats.h"

namespace memkernels::selection::cuda {

using namespace attention::cuda;

struct ColstatsParams {
  AttentionParams a;
  const float* lse;  // [total_q, Hq]
  int64_t lse_stride, lse_head_stride;
  ColumnReduce reduce;
  float threshold;  // NaN: 1 / t
  bool accumulate;
  float decay;
  float* stats;  // [B, Hkv, stats_stride], contiguous
  int64_t stats_stride;
};

inline constexpr int kColstatsThreads = 128;

}  // namespace memkernels::selection::cuda
