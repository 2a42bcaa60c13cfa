// How paged attention is cut into tasks on the CPU, and the kernels that run them.
#pragma once

#include <stddef.h>

#include "attention/problem.h"
#include "core/isa.h"

namespace memkernels::attention {

// Rows (queries times heads of a group) in a query block.
inline constexpr int64_t kBlockRows = 96;

// How one sequence is computed. If its queries fit in one block, the keys are split, each split has
// a partial state, and these are merged in order; otherwise each block of queries goes through all
// of its keys.
struct SequenceTasks {
  int64_t num_splits, split_len;
  int64_t shared_splits = 0;  // so many splits, from the first, are computed with other sequences
  bool one_task = true;       // that merges as it goes, instead of a task a split and a merge
  int64_t num_blocks, block_queries;
  int64_t head_groups, heads_per_task;
  int64_t first_task;
  int64_t first_partial;  // of several tasks: partial states are laid out [split][query][head]
};

// Accumulators of a partial state: max, sum, values.
inline constexpr int64_t partial_size(int64_t dim_v) { return 2 + (dim_v + 31) / 32 * 32; }

// A split whose keys several sequences of equally many queries have in common.
struct SharedSplit {
  int64_t split;
  int64_t begin, end;  // members, in ForwardJob::members
};

// Tasks: a KV head of a shared split each, then those of the sequences.
struct ForwardJob {
  const Problem* problem;
  const SequenceTasks* tasks;  // [num_sequences]
  const SharedSplit* shared;   // [num_shared]
  int64_t num_shared;
  const int64_t* members;  // sequences
  int64_t num_tasks;
  void* partials;
};

struct ForwardKernel {
  size_t (*scratch_bytes)(const Problem&, int64_t max_rows, int64_t max_heads);
  void (*run)(const ForwardJob&, int64_t task, void* scratch);
  void (*merge)(const ForwardJob&, int64_t sequence, int64_t query);
};

MEMKERNELS_DECLARE_CPU(ForwardKernel, forward_kernel, (Dtype dtype))

}  // namespace memkernels::attention
