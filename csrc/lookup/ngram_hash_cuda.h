// What the CUDA kernel of ngram_hash reads.
#pragma once

#include "core/cuda/launch.h"

namespace memkernels::lookup::cuda {

using namespace memkernels::cuda;

inline constexpr int kHashThreads = 256;
inline constexpr int kHashTokens = 128;  // of a tile
inline constexpr int kHashOrders = 16;   // of a launch
inline constexpr int kHashBlocks = 5;    // of a multiprocessor

struct NgramHashParams {
  Integers ids;  // [B, T]
  int64_t ids_row_stride, length, tokens;
  Integers past_ids;  // [N, reach], or absent: pad_id
  int64_t past_row_stride, reach, pad_id;
  Integers cu_seqlens;  // [N + 1], or absent
  int64_t num_sequences;
  Integers multipliers, moduli, offsets;
  int64_t eos_id;
  int64_t orders[kHashOrders];
  int num_orders, heads;  // heads of an order
  int64_t first, width;   // of these orders the first head; all heads
  int chunks;             // of kHashThreads heads
  int64_t* rows;          // [B, T, width]
};

}  // namespace memkernels::lookup::cuda
