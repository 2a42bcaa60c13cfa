// What the CUDA kernels of the indexer's scores read.
#pragma once

#include "attention/paged_attention_cuda.h"
#include "selection/indexer_scores.h"

namespace memkernels::selection::cuda {

using namespace memkernels::cuda;
using attention::cuda::AttentionParams;

// Four warps, each with keys of its own.
inline constexpr int kIndexerThreads = 128;

struct IndexerParams {
  AttentionParams a;  // q, k, and who sees what
  const void* w;      // [T, Hi]
  int64_t w_stride, w_head_stride;
  bool w_is_float;
  int head_blocks;  // of 8 columns, for the heads of a query
  int run;          // queries of a block; 0: sequences have one
  int key_tiles;    // of a sequence
  int num_tokens;   // N
  int stages;       // tiles of heads in shared memory
  float* scores;    // [T, N]
};

struct IndexerBackwardParams {
  IndexerParams s;       // of the forward, but for the gradient of the scores
  void *dq, *dw, *dk;    // contiguous; each null if not wanted
  int parts_of_unit;     // blocks of keys of a page, or of a sequence of contiguous keys
  int parts;             // that queries are cut into, so that few keys fill the GPU
  float* partial_dk;     // where parts > 1: [parts], dk's shape
  const int* entries;    // of the page table, sorted by page
  const int* run_begin;  // [num_pages + 1]: where those of each begin; null without pages
  int columns;           // of the page table
};

// Of columns of dq and dk in a block; longer head dimensions are cut into slices.
inline constexpr int kIndexerSlice = 128;

// Brings the offsets of the only sequence to the device.
IndexerParams indexer_params(const char* op, const IndexerArgs& args,
                             const attention::Shapes& shapes, const Context& ctx);

// Bytes of shared memory that `keys` keys and the stages of `columns` heads take.
int64_t indexer_bytes(const IndexerParams& p, int64_t item_size, int keys, int columns);

}  // namespace memkernels::selection::cuda
