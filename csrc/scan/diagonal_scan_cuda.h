// What the CUDA kernels of diagonal_scan read.
#pragma once

#include "scan/parts.cuh"

namespace memkernels::scan::cuda {

inline constexpr int kPartTokens = 32;    // of a warp
inline constexpr int kGroupColumns = 64;  // of a warp, two neighbouring ones of a lane
inline constexpr int kDiagonalWarps = 8;  // the most of a block
inline constexpr int kSumWarps = 8;
inline constexpr int kSumParts = 64;  // that a warp adds up at a time

// What a part makes of the carry that comes into it: a scale^3 carry + b, of two columns or of one
// complex number.
struct alignas(8) Summary {
  float a[2], b[2], scale[2];
};

// A block takes all tiles of a sequence, one after another; or one tile, whose parts it sums up, or
// whose carries are known.
enum class DiagonalWork { all, sum_up, apply };

// Columns are the D, or 2 D of complex numbers. A backward goes through the parts from the last one
// on; its x is dh, its carry conj(a) dx of the token behind.
struct DiagonalParams {
  PartParams parts, tiles;  // of kPartTokens, and of a block's warps
  DiagonalWork work;
  const void *x, *a, *h;  // [B, T, D], also [D], [B, T, D] or null
  int64_t x_strides[2], a_strides[2], h_strides[2];
  bool constant;         // a is [D]
  bool aligned;          // rows, to 16 bytes
  const uint8_t* reset;  // [B, T], or null
  int64_t reset_strides[2];
  const float *start, *initial;  // [N, D] or null: of the carry, of h
  int64_t start_stride, initial_stride;
  int columns, groups;
  void *out, *da;  // [B, T, D]: h or dx; the latter may be null
  float* end;      // [N, D], or null: the last carry
  float* sums;     // [parts, columns]: of a backward with one a for all tokens, or null
  // Of `groups` times 32 lanes for each part; not of DiagonalWork::all.
  Summary* summaries;  // whose b becomes the carry that comes in
  int* cuts;           // [parts]: whether it lets no carry pass
};

struct DiagonalSumParams {
  PartParams parts;
  const float* sums;    // [parts, columns]
  float* totals;        // [N, columns]
  int columns, groups;  // groups: of 32
};

}  // namespace memkernels::scan::cuda
