// Scores of the pages of a sequence for its queries, by their summaries.
#pragma once

#include <stddef.h>

#include "core/context.h"
#include "core/isa.h"
#include "core/tensor.h"
#include "selection/summarize_keys.h"

namespace memkernels::selection {

enum class GroupReduce { max, mean, sum };

struct ScorePagesArgs {
  TensorView q;             // [total_q, Hq, D]
  TensorView summary;       // [num_pages, Hkv, 2, D] or [num_pages, Hkv, D]
  TensorView page_table;    // [B, max_pages]
  TensorView seq_lens;      // [B]
  TensorView cu_seqlens_q;  // [B + 1]; absent: one query a sequence
  int64_t page_size = 0;
  SummaryKind kind = SummaryKind::minmax;
  GroupReduce reduce = GroupReduce::max;
  bool causal = true;
  double scale = 1.0;
  TensorView scores;  // [total_q, Hkv, max_pages] float32 (float64 for float64), contiguous
};

void score_pages(const ScorePagesArgs& args, const Context& ctx);

namespace cuda {
void score_pages(const ScorePagesArgs& args, const Context& ctx);  // checked ones
}  // namespace cuda

// Some pages of a sequence for some of its queries, and all heads.
struct ScoreTask {
  const ScorePagesArgs* args;
  int64_t sequence;
  int64_t first_query;  // row of q
  int64_t num_queries;
  int64_t first_page, num_pages;  // columns of the page table
  int64_t position;               // of the first query in its sequence
};

struct ScoreKernel {
  size_t (*scratch_bytes)(const ScorePagesArgs& args, int64_t num_queries);
  void (*run)(const ScoreTask& task, void* scratch);
};

// By the dtypes of q and summary: equal, or any q with a float32 summary.
MEMKERNELS_DECLARE_CPU(ScoreKernel, score_kernel, (Dtype q, Dtype summary))

}  // namespace memkernels::selection
