// How the backward of paged attention is cut into tasks on the CPU, and the kernels that run them.
#pragma once

#include <stddef.h>

#include "attention/problem.h"
#include "core/isa.h"

namespace memkernels::attention {

// Accumulators a row of the head dimension takes, whatever the instruction set.
inline constexpr int64_t padded_dim(int64_t dim) { return (dim + 31) / 32 * 32; }

// A task owns the gradients of a chunk of the keys of one KV head of one sequence; what it adds to
// dq goes to a buffer of the chunk's own, [chunk][Hkv][block][block_rows][D].
struct BackwardTasks {
  int64_t num_chunks, chunk_len;
  int64_t num_blocks, block_queries, block_rows;
  int64_t first_task;
  int64_t first_dq;  // accumulators before this sequence's
};

struct BackwardJob {
  const Problem* problem;
  const BackwardTasks* tasks;  // [num_sequences]
  int64_t num_tasks;
  Rows dout, dq, dk, dv, dkey_bias;  // no data: not asked for (dout is always there)
  const void* dlse;                  // [total_q, Hq] or null
  void* delta;                       // [total_q, Hq] rowsum(dout * out) - dlse, in accumulators
  void* dq_chunks;
  // Pages that appear more than once are accumulated in buffers of their own, by one task a head
  // in a fixed order: slot of a page, or -1; null when no page is shared.
  const int32_t* shared_slot;
  int64_t num_shared;
  void* shared_dk;    // [num_shared, page_size, Hkv, padded_dim(D)], zeroed
  void* shared_dv;    // [num_shared, page_size, Hkv, padded_dim(Dv)]
  void* shared_bias;  // [num_shared, page_size, Hkv]
  int64_t num_pages;
};

struct BackwardKernel {
  size_t (*scratch_bytes)(const Problem&, int64_t block_rows);
  void (*delta)(const BackwardJob&, int64_t token);
  void (*run)(const BackwardJob&, int64_t task, void* scratch);
  void (*finish_query)(const BackwardJob&, int64_t sequence, int64_t query);
  void (*finish_shared)(const BackwardJob&, int64_t kv_head);
};

MEMKERNELS_DECLARE_CPU(BackwardKernel, backward_kernel, (Dtype dtype))

}  // namespace memkernels::attention
