// What the CUDA kernels of product_key_topk read.
#pragma once

#include "core/cuda/launch.h"
#include "lookup/product_key_topk.h"

namespace memkernels::lookup::cuda {

using namespace memkernels::cuda;

inline constexpr int kSearchThreads = 256, kMergeThreads = 128;
inline constexpr int kSearchBlocks = 2;  // of a multiprocessor, at least
inline constexpr int kRows = 32;         // tokens of a block
inline constexpr int kTileKeys = 128;
inline constexpr int kSpareKeys = 32;  // of a list, beside the k best
inline constexpr int kMostStages = 3;

struct ProductKeyParams {
  const void* query;  // [T, H, 2, Dk], from the first token of the launch on
  int64_t query_stride, query_head_stride, query_half_stride;
  const void* keys;  // [H, 2, N, Dk]
  int64_t key_head_stride, key_half_stride, key_stride;
  bool aligned;  // rows of both can be copied by 16 bytes
  int tokens, heads, size, dim, k;
  int slices;        // of a row
  int stages;        // slices of tiles that are in shared memory, 2 or 3
  bool q_stays;      // all slices of queries fit into shared memory
  int stretches;     // of the tiles of keys, a block each
  int room;          // for the keys that a block keeps of a token
  int merge_room;    // for the pairs of a token
  uint64_t* lists;   // [T, H, 2, stretches, k]: best keys of a half, in order
  float* scores;     // [T, H, k]
  int64_t* indices;  // [T, H, k]
};

}  // namespace memkernels::lookup::cuda
