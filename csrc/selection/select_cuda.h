// What the CUDA kernels of select_topk and evict read.
#pragma once

#include "core/cuda/launch.h"

namespace memkernels::selection::cuda {

using namespace memkernels::cuda;

// Of the keys that scores become: 11 bits a pass; 8 in the small blocks of short rows.
inline constexpr int kDigitBits = 11, kDigits = 1 << kDigitBits, kPasses = 3;
inline constexpr int kShortDigitBits = 8;
inline constexpr int kShortThreads = 128, kMaxThreads = 1024;
inline constexpr int kCachedKeys = 16384;  // that a row's block keeps in shared memory
inline constexpr int kPartLength = 16384;  // of a row that several blocks share

// Ints of shared memory before the keys: a histogram, what warps tell each other.
inline constexpr int kFixedInts = kDigits + 2 * kMaxThreads / 32 + 4;

// Of entries, those above a cut and those on it.
struct Count {
  int above, equal;
};

struct SelectParams {
  const void* scores;  // [..., n]
  int leading;         // dimensions before the last
  int64_t sizes[kMaxDims - 1], strides[kMaxDims - 1];
  Integers lengths, budgets;  // their own strides are these
  int64_t length_strides[kMaxDims - 1], budget_strides[kMaxDims - 1];
  int n, room;
  int keep_first, keep_last;
  bool any;       // -inf and NaN can be selected, the latter last
  float lowest;   // else scores above -inf that reach this
  int32_t* out;   // [rows, room]
  int parts;      // of a row, a block each
  int* digits;    // [kPasses][rows][kDigits], zeroed: how many keys have them. Where parts > 1, as
  Count* counts;  // [rows][parts]
  int64_t rows;
};

}  // namespace memkernels::selection::cuda
