// What the CUDA kernels of knn_topk read.
#pragma once

#include "core/cuda/launch.h"
#include "selection/knn_topk.h"

namespace memkernels::selection::cuda {

using namespace memkernels::cuda;

inline constexpr int kSearchThreads = 256;
inline constexpr int kEntries = 128;  // of a tile

// Queries of a block: 16, or, where each entry is multiplied with many, 128. With buckets they are
// 32, since the best of each bucket stay in registers.
inline constexpr int kFewRows = 16, kManyRows = 128, kBucketRows = 32;

constexpr int stages_of(int rows) { return rows == kFewRows ? 4 : 3; }
// Blocks a multiprocessor has registers for.
constexpr int resident_blocks(int item_size, int rows) {
  return item_size == 4 && rows == kManyRows ? 1 : 2;
}

struct KnnParams {
  const void* q;  // [Q, H, D], from the first query of the launch on
  int64_t q_stride, q_head_stride;
  const void* bank;  // [H, N, D]
  int64_t bank_head_stride, bank_stride;
  bool aligned;        // rows of both can be copied by 16 bytes
  Integers valid_len;  // [H], or absent
  Metric metric;
  int num_queries, heads, num_entries, dim;
  int buckets;   // 0: exact search
  int distinct;  // of them: where buckets are few, several stand for one. 0: lists have no order

  // A block searches a stretch of the tiles of entries; or of buckets, in a part of the rounds
  // through the bank.
  int query_blocks, stretches, parts;
  int slices;    // of a row
  bool q_stays;  // all slices of queries fit into shared memory

  int least, most;  // of the best that are looked for, and that may be left to sort
  int64_t room;     // of a list
  uint64_t* keys;   // [num_queries, H, stretches, parts][room]; by bucket, if `distinct`
  int* counts;      // [num_queries, H, stretches]: keys of each list
  uint64_t* best;   // [num_queries, H][most], or null: in shared memory

  int64_t k;
  float* values;     // [Q, H, k], from the first query on
  int64_t* indices;  // [Q, H, k]
};

}  // namespace memkernels::selection::cuda
