// How much attention each key receives: the probabilities of paged attention, reduced over queries
// and heads of a group, from the log-sum-exps of its forward.
#pragma once

#include <stddef.h>

#include "attention/paged_attention.h"
#include "attention/problem.h"
#include "core/isa.h"

namespace memkernels::attention {
struct Shapes;
}

namespace memkernels::selection {

enum class ColumnReduce { sum, max, count };

struct ColstatsArgs {
  attention::PagedAttentionArgs attention;  // v_cache is k_cache; lse [total_q, Hq] is read
  ColumnReduce reduce = ColumnReduce::sum;
  double threshold = __builtin_nan("");  // of "count"; NaN: 1 / t for a query at position t - 1
  bool accumulate = false;
  double decay = 1.0;
  TensorView stats;  // [B, Hkv, >= Lmax], contiguous, written; zeroed before unless accumulate
};

void attention_colstats(const char* op, const ColstatsArgs& args, const Context& ctx);

struct ColstatsJob {
  const attention::Problem* problem;
  const ColstatsArgs* args;
};

// Queries times heads of a group, up to which dot products beat packing.
inline constexpr int64_t kFewRows = 12;

// Keys [begin, end) of a sequence for KV heads [h0, h1): one, unless it has few rows.
struct ColstatsTask {
  int64_t sequence, begin, end, h0, h1;
};

struct ColstatsKernel {
  size_t (*scratch_bytes)(const attention::Problem&);
  void (*run)(const ColstatsJob& job, const ColstatsTask& task, void* scratch);
};

MEMKERNELS_DECLARE_CPU(ColstatsKernel, colstats_kernel, (Dtype dtype))

namespace cuda {
void attention_colstats(const char* op, const ColstatsArgs& args, const attention::Shapes& shapes,
                        const Context& ctx);
}

}  // namespace memkernels::selection
