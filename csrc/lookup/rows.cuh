// What lookups do with the rows of a table: multiply them with a vector, and add them up. Groups of
// neighbouring lanes share a row, with several rows in flight.
//
// A product takes the columns in an order that follows from their number alone, and a sum the rows
// in one that follows from the length of the list, so that no bit depends on who does the work.
#pragma once

#include "core/cuda/chunk.cuh"

namespace memkernels::lookup::cuda {

using namespace memkernels::cuda;

struct Table {
  const void* data;  // [N, columns]
  int64_t stride;    // in elements
  int columns;
};

// What a lane reads at once is 16 bytes, or, where rows are not aligned to them, an element; zeros
// beyond the columns, and for a row below 0.
template <class T, int kElements>
__device__ __forceinline__ Chunk<T, kElements> load_chunk(const Table& table, int64_t row,
                                                          int column) {
  if (row < 0 || column >= table.columns) return {};
  const T* const from = static_cast<const T*>(table.data) + row * table.stride + column;
  return *reinterpret_cast<const Chunk<T, kElements>*>(from);
}

// ---- products -----------------------------------------------------------------------------------

inline constexpr int kProductRows = 2;  // of a group at a time

// Lanes that share a row: four chunks each, if there are as many.
__host__ __device__ __forceinline__ int product_lanes(int columns, int elements) {
  return columns <= 32 * elements ? 8 : columns <= 64 * elements ? 16 : 32;
}

// products = rows . x, a row of a table of as many columns. The whole warp takes part, and each
// lane of a group gets the products.
template <class T, int kElements>
__device__ __forceinline__ void multiply_rows(float (&products)[kProductRows], const Table& table,
                                              const int (&rows)[kProductRows], const Table& xs,
                                              int64_t x, int lanes) {
  constexpr int kChunks = 4;
  float sums[kProductRows] = {};
  const int step = lanes * kElements;
  for (int c = threadIdx.x % lanes * kElements; c < table.columns; c += kChunks * step) {
    Chunk<T, kElements> left[kChunks], right[kProductRows][kChunks];
#pragma unroll
    for (int r = 0; r < kProductRows; ++r) {
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        right[r][i] = load_chunk<T, kElements>(table, rows[r], c + i * step);
      }
    }
#pragma unroll
    for (int i = 0; i < kChunks; ++i) left[i] = load_chunk<T, kElements>(xs, x, c + i * step);
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        const float factor = widen(left[i].elements[e]);
#pragma unroll
        for (int r = 0; r < kProductRows; ++r) sums[r] += factor * widen(right[r][i].elements[e]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kProductRows; ++r) {
    for (int other = lanes / 2; other > 0; other /= 2) {
      sums[r] += __shfl_xor_sync(kWholeWarp, sums[r], other);
    }
    products[r] = sums[r];
  }
}

// ---- sums ---------------------------------------------------------------------------------------

// A group of lanes has a slab of a row's columns. A list has at most kRuns runs of entries, each of
// which a group of its own may add up.
inline constexpr int kSlabLanes = 8;
inline constexpr int kRuns = 32;

struct Entry {
  int row;  // below 0: none
  float factor;
};

__host__ __device__ __forceinline__ int run_length(int entries) {
  return (entries + kRuns * kSlabLanes - 1) / (kRuns * kSlabLanes) * kSlabLanes;
}

// totals = sum of factor * row over the entries [begin, end) of a list, from the beginning of a run
// on; each run is added up, and then they are, in order. The whole warp takes part, with as many
// entries in each of its groups; entry_at(i) must know what is beyond the list: no row.
template <class T, int kElements, class EntryAt>
__device__ __forceinline__ void sum_rows(float (&totals)[kElements], const Table& table, int column,
                                         int begin, int end, int run, const EntryAt& entry_at) {
  const int lane = threadIdx.x % kSlabLanes;
  float sums[kElements] = {};
  int left = run;
  Entry entry = entry_at(begin + lane);
#pragma unroll 1
  for (int i = begin; i < end; i += kSlabLanes) {
    const Entry next = entry_at(i + kSlabLanes + lane);
    Chunk<T, kElements> chunks[kSlabLanes];
#pragma unroll
    for (int r = 0; r < kSlabLanes; ++r) {
      const int row = __shfl_sync(kWholeWarp, entry.row, r, kSlabLanes);
      chunks[r] = load_chunk<T, kElements>(table, row, column);
    }
#pragma unroll
    for (int r = 0; r < kSlabLanes; ++r) {
      const float factor = __shfl_sync(kWholeWarp, entry.factor, r, kSlabLanes);
#pragma unroll
      for (int e = 0; e < kElements; ++e) sums[e] += factor * widen(chunks[r].elements[e]);
    }
    entry = next;
    left -= kSlabLanes;
    if (left > 0 && i + kSlabLanes < end) continue;
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      totals[e] += sums[e];
      sums[e] = 0.f;
    }
    left = run;
  }
}

// out = sum of factor * row over a list, for slabs [first, last) of the columns, by a block. A
// single slab has a group for each run, which takes kRuns * kSlabLanes * kElements floats of
// `memory`.
template <class T, int kElements, class EntryAt>
__device__ __forceinline__ void sum_slabs(T* out, const Table& table, int entries, int first,
                                          int last, float* memory, const EntryAt& entry_at) {
  constexpr int kSlab = kSlabLanes * kElements;
  const int groups = blockDim.x / kSlabLanes, group = threadIdx.x / kSlabLanes;
  const int lane = threadIdx.x % kSlabLanes, run = run_length(entries);
  if (last - first > 1) {
    for (int slab = first; slab < last; slab += groups) {
      const int column = (slab + group) * kSlab + lane * kElements;
      float totals[kElements] = {};
      sum_rows<T, kElements>(totals, table, column, 0, entries, run, entry_at);
      if (slab + group >= last || column >= table.columns) continue;
      Chunk<T, kElements> chunk;
#pragma unroll
      for (int e = 0; e < kElements; ++e) narrow(totals[e], chunk.elements[e]);
      *reinterpret_cast<Chunk<T, kElements>*>(out + column) = chunk;
    }
    return;
  }
  const int runs = (entries + run - 1) / run, column = first * kSlab;
  for (int r = 0; r < runs; r += groups) {
    const int begin = (r + group) * run;
    float totals[kElements] = {};
    sum_rows<T, kElements>(totals, table, column + lane * kElements, begin, begin + run, run,
                           entry_at);
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      if (r + group < runs) memory[(r + group) * kSlab + lane * kElements + e] = totals[e];
    }
  }
  __syncthreads();
  for (int c = threadIdx.x; c < kSlab && column + c < table.columns; c += blockDim.x) {
    float total = 0.f;
#pragma unroll 8
    for (int r = 0; r < runs; ++r) total += memory[r * kSlab + c];
    narrow(total, out[column + c]);
  }
}

}  // namespace memkernels::lookup::cuda
