// Scores of tokens by small heads of their own: I[t, s] = sum_h w[t, h] * relu(q[t, h] . k[s]).
#pragma once

#include <stddef.h>

#include "attention/paged_attention.h"
#include "attention/problem.h"
#include "core/isa.h"

namespace memkernels::attention {
struct Shapes;
}

namespace memkernels::selection {

struct IndexerArgs {
  attention::PagedAttentionArgs
      attention;      // q [T, Hi, D]; k_cache has one head, v_cache is k_cache
  TensorView w;       // [T, Hi]
  TensorView scores;  // [T, N] float32 (float64 for float64), contiguous; N: tokens k has room for
  bool one_sequence = false;  // of all queries, whose offsets are in the host's memory
};

void indexer_scores(const IndexerArgs& args, const Context& ctx);

// Gradients that are absent are not computed. args.scores holds the gradient of the scores.
struct IndexerGrads {
  TensorView dq;  // [T, Hi, D], contiguous
  TensorView dw;  // [T, Hi], contiguous
  TensorView dk;  // k's shape, contiguous
};

void indexer_scores_backward(const IndexerArgs& args, const IndexerGrads& grads,
                             const Context& ctx);

namespace cuda {
void indexer_scores(const char* op, const IndexerArgs& args, const attention::Shapes& shapes,
                    const Context& ctx);
void indexer_scores_backward(const char* op, const IndexerArgs& args, const IndexerGrads& grads,
                             const attention::Shapes& shapes, const Context& ctx);
}  // namespace cuda

struct IndexerJob {
  const attention::Problem* problem;
  const IndexerArgs* args;
  const IndexerGrads* grads;
  void* dk;  // [outer, tokens, padded dim] in accumulators, added to
};

// Queries [i0, i1) of a sequence, and its keys [begin, end).
struct IndexerTask {
  int64_t sequence, i0, i1, begin, end;
};

struct IndexerKernel {
  size_t (*scratch_bytes)(const attention::Problem&);
  void (*forward)(const IndexerJob&, const IndexerTask&, void* scratch);
  void (*queries)(const IndexerJob&, const IndexerTask&, void* scratch);  // dq and dw
  void (*keys)(const IndexerJob&, const IndexerTask&, void* scratch);     // adds to dk
  void (*finish_keys)(const IndexerJob&, int64_t outer);                  // of one page or sequence
};

MEMKERNELS_DECLARE_CPU(IndexerKernel, indexer_kernel, (Dtype dtype))

}  // namespace memkernels::selection
