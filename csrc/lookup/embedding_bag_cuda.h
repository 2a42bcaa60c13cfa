// What the CUDA kernels of embedding_bag and embedding_bag_weights read.
#pragma once

#include "core/cuda/launch.h"

namespace memkernels::lookup::cuda {

using namespace memkernels::cuda;

inline constexpr int kBagThreads = 256;
// Rows that a group of lanes reads at once.
inline constexpr int kRowsAtOnce = 8;
// A sum is one of the sums of parts of the bag, so that parts may be anyone's.
inline constexpr int kMaxParts = 64;
// Beside shorter bags, longer ones are the work of a whole block.
inline constexpr int kLongBag = kRowsAtOnce * kMaxParts;

// Rows of a part: for the bag's own length, and that alone. A power of two.
__host__ __device__ __forceinline__ int part_length(int64_t bag_length) {
  int length = kRowsAtOnce;
  while (int64_t{length} * kMaxParts < bag_length) length *= 2;
  return length;
}

struct BagParams {
  Integers input;  // [T, K] or [entries], along its last dimension
  int64_t input_row_stride;
  Integers offsets;  // [T], or no data: bag t has the K entries of row t
  int64_t num_bags, bag_length, num_entries;
  const void* factors;  // strided like input, or null: 1
  int64_t factor_stride, factor_row_stride;
  bool wide_factors;  // float32, else the dtype of the table

  const void* table;  // [N, D]
  bool table_on_host;
  int64_t row_stride, num_rows;
  int dim;
  const void* scales;  // [N, D / scale_block] of a quantised one: float32, or uint8 for e8m0
  int64_t scale_stride, scale_row_stride;
  int scale_block;
  bool e8m0;

  // So many lanes take one chunk each of a row, `slices` groups of them a row of a bag.
  int lanes, slices;
  // The same where a whole block takes a bag: all of them if `by_block`, else long ones.
  int block_lanes, block_slices;
  bool by_block;

  const void* grad;  // [T, D]
  int64_t grad_stride;
  void* out;  // [T, D]; of the gradient of factors float32 [entries]
};

}  // namespace memkernels::lookup::cuda
