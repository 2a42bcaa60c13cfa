// What the CUDA kernels of embedding_bag_backward read.
#pragma once

#include "core/cuda/launch.h"

namespace memkernels::lookup::cuda {

using namespace memkernels::cuda;

inline constexpr int kPiece = 64;  // entries of a row that a warp adds up
inline constexpr int kFan = 32;    // sums that a warp adds up afterwards
inline constexpr int kGradWarps = 4, kGradThreads = 32 * kGradWarps;
inline constexpr int kPositions = kPiece * kGradWarps;  // sorted entries of a block
inline constexpr int kLaneColumns = 8, kTileColumns = 32 * kLaneColumns;
inline constexpr int kScanThreads = 1024;
inline constexpr int kMostStages = 5;  // of sums that are stored: 64 * 32^5 = 2^31

// Sums to be added up for a row: those of its entries in sorted order from `first` on.
struct Node {
  uint32_t row;  // of the result
  int begin;     // of the row's entries
  int first;
};

// Sums of so many entries each, but for the last of a row. The row's first one is in an odd place:
// where it begins there may be the end of another row.
struct Stage {
  float* sums;     // [entries / span][2][D]
  Node* nodes;     // of the next stage, in any order
  int* num_nodes;  // zeroed
};

struct BagGradParams {
  const void* grad;  // [T, D]
  int64_t grad_stride;
  Integers input;  // [T, K], or [n] with offsets: T = 1, K = n
  int64_t input_row_stride;
  const void* factors;  // alike, or null: 1
  bool factors_are_float;
  int64_t factor_stride, factor_row_stride;
  Integers offsets;
  int64_t num_bags;
  int n, width;      // entries, in all and of a row of input
  int64_t num_rows;  // of the table; and the key of entries that count for nothing
  int dim, tiles;    // of kTileColumns

  uint32_t* keys;  // [n], sorted
  int* entries;    // [n]
  int* bags;       // [n] by entry, with offsets

  void* out;  // [*, D]
  int64_t out_stride;
  bool out_is_float, accumulate;
  // Where rows are listed, [n] of them and of out: what is not used is filled. And how many there
  // are, all and before each block of sorted entries.
  int64_t *rows, *count;
  int* ranks;
};

}  // namespace memkernels::lookup::cuda
