// The smallest and the largest of each channel over the keys of a page, or their mean.
//
// Cost: every key in use is read once, by 16 bytes a thread, many in flight: bound by memory.
#pragma once

#include "core/cuda/chunk.cuh"
#include "selection/summarize_keys_cuda.h"

namespace memkernels::selection::cuda {

struct TablePages {
  int64_t length;      // of the sequence
  int64_t begin, end;  // columns of the page table: those with new tokens, and what is in use
};
__device__ __forceinline__ TablePages pages_of(const SummarizeParams& p, int64_t b) {
  TablePages pages{clamp(at(p.seq_lens, b), 0, p.max_pages * p.page_size), 0, 0};
  pages.end = (pages.length + p.page_size - 1) / p.page_size;
  const int64_t num_new = p.num_new.data ? at(p.num_new, b) : p.num_new_all;
  if (num_new < pages.length) pages.begin = (pages.length - num_new) / p.page_size;
  if (num_new <= 0) pages.begin = pages.end;
  return pages;
}

// -1 where there is none.
__device__ __forceinline__ int64_t page_at(const SummarizeParams& p, int64_t b, int64_t column) {
  const int64_t page =
      integer_at(p.page_table, b * p.table_row_stride + column * p.page_table.stride);
  return page < p.num_pages ? page : -1;
}

// Which pages are in use, how far, and who updates them.
static __global__ void __launch_bounds__(256) find_fills(const SummarizeParams p) {
  const int64_t entry = int64_t{blockIdx.x} * 256 + threadIdx.x;
  if (entry >= p.num_entries) return;
  const int64_t b = entry / p.max_pages, column = entry % p.max_pages;
  const TablePages pages = pages_of(p, b);
  if (column >= pages.end) return;
  const int64_t page = page_at(p, b, column), left = pages.length - column * p.page_size;
  if (page < 0) return;
  atomicMax(&p.fills[page], static_cast<int>(left < p.page_size ? left : p.page_size));
  if (p.claims && column >= pages.begin) atomicMax(&p.claims[page], static_cast<int>(entry) + 1);
}

// A block a page. kElements: as many as a thread reads at once.
template <class T, int kElements>
__global__ void __launch_bounds__(kSummaryThreads, 1) summarize(const SummarizeParams p) {
  int64_t page = blockIdx.x;
  if (p.claims && p.most_new_pages == 0) {
    if (p.claims[page] == 0) return;
  } else if (p.claims) {
    const int64_t b = page / p.most_new_pages;
    const TablePages pages = pages_of(p, b);
    const int64_t column = pages.begin + page % p.most_new_pages;
    page = column < pages.end ? page_at(p, b, column) : -1;
    if (page < 0 || p.claims[page] != b * p.max_pages + column + 1) return;
  }
  const int tokens = p.fills[page];
  for (int i = threadIdx.x * kElements; i < p.heads * p.dim; i += kSummaryThreads * kElements) {
    const int head = i / p.dim, d = i % p.dim;
    const T* const keys =
        static_cast<const T*>(p.k) + page * p.page_stride + head * p.head_stride + d;
    float least[kElements] = {}, most[kElements] = {}, sum[kElements] = {};
    bool nan[kElements] = {};
#pragma unroll 8
    for (int t = 0; t < tokens; ++t) {
      const auto key = *reinterpret_cast<const Chunk<T, kElements>*>(keys + t * p.token_stride);
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        const float x = widen(key.elements[e]);
        least[e] = t == 0 || x < least[e] ? x : least[e];
        most[e] = t == 0 || x > most[e] ? x : most[e];
        nan[e] |= x != x;
        sum[e] += x;
      }
    }
    if (p.minmax) {
      T* const to = static_cast<T*>(p.summary) + (page * p.heads + head) * 2 * p.dim + d;
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        narrow(nan[e] ? bits_to_float(0x7fc00000u) : least[e], to[e]);
        narrow(nan[e] ? bits_to_float(0x7fc00000u) : most[e], to[p.dim + e]);
      }
    } else {
      float* const to = static_cast<float*>(p.summary) + (page * p.heads + head) * p.dim + d;
#pragma unroll
      for (int e = 0; e < kElements; ++e) to[e] = tokens > 0 ? sum[e] / tokens : 0.f;
    }
  }
}

}  // namespace memkernels::selection::cuda
