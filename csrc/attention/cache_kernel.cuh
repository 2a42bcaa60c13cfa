// append_kv, copy_pages and compact_kv: rows of heads moved in words of up to 16 bytes.
//
// Cost: every row is read once and written once; nothing is computed, so the limit is the copy
// bandwidth (4.8 TB/s of an H200 count both ways). compact_kv has one block a sequence, head,
// cache and slice of 64 bytes or more: few sequences do not fill the GPU.
#pragma once

#include "attention/cache_cuda.h"
#include "core/cuda/device.cuh"

namespace memkernels::attention::cuda {

// As many bytes as one instruction moves.
template <class Part, int kParts>
struct alignas(sizeof(Part) * kParts) Word {
  Part parts[kParts];
};

// The heads of one token, copied by `threads` threads of which this is the `thread`-th.
template <class W>
__device__ __forceinline__ void copy_heads(char* to, int64_t to_stride, const char* from,
                                           int64_t from_stride, int heads, int words, int log_lanes,
                                           int thread, int threads) {
  const int lane = thread & ((1 << log_lanes) - 1);
  for (int h = thread >> log_lanes; h < heads; h += threads >> log_lanes) {
    const W* const source = reinterpret_cast<const W*>(from + h * from_stride);
    W* const target = reinterpret_cast<W*>(to + h * to_stride);
    for (int w = lane; w < words; w += 1 << log_lanes) target[w] = source[w];
  }
}

// Blocks: tokens times K and V.
template <class W>
__global__ void __launch_bounds__(kCopyThreads) append(const AppendParams p) {
  const int64_t token = blockIdx.x / 2;
  const int side = blockIdx.x % 2;
  const int64_t slot = at(p.slots, token);
  if (slot < 0 || slot >= p.num_slots) return;
  const CacheBytes& cache = p.caches[side];
  const NewTokens& from = p.tokens[side];
  copy_heads<W>(
      cache.data + slot / p.page_size * cache.page_stride + slot % p.page_size * cache.token_stride,
      cache.head_stride, from.data + token * from.token_stride, from.head_stride, p.heads,
      cache.words, cache.log_lanes, threadIdx.x, kCopyThreads);
}

// Blocks: pairs times K and V times groups of tokens.
template <class W>
__global__ void __launch_bounds__(kCopyThreads) copy(const CopyParams p) {
  const int64_t groups = (p.page_size + kTokensOfBlock - 1) / kTokensOfBlock;
  const int64_t pair = blockIdx.x / groups / 2, group = blockIdx.x % groups;
  const CacheBytes& cache = p.caches[blockIdx.x / groups % 2];
  const int64_t source = at(p.pairs, pair);
  const int64_t target = integer_at(p.pairs, pair * p.pairs.stride + p.side_stride);
  if (source < 0 || source >= p.num_pages || target < 0 || target >= p.num_pages) return;
  for (int t = 0; t < kTokensOfBlock; ++t) {
    const int64_t token = group * kTokensOfBlock + t;
    if (token >= p.page_size) return;
    const int64_t within = token * cache.token_stride;
    copy_heads<W>(cache.data + target * cache.page_stride + within, cache.head_stride,
                  cache.data + source * cache.page_stride + within, cache.head_stride, p.heads,
                  cache.words, cache.log_lanes, threadIdx.x, kCopyThreads);
  }
}

// Byte offset of a token of sequence b, -1 where it has no place.
__device__ __forceinline__ int64_t place_of(const CompactParams& p, const CacheBytes& cache,
                                            int64_t b, int64_t token) {
  const int64_t column = token / p.page_size;
  if (token < 0 || column >= p.max_pages) return -1;
  const int64_t page =
      integer_at(p.page_table, b * p.table_row_stride + column * p.page_table.stride);
  if (page < 0 || page >= p.num_pages) return -1;
  return page * cache.page_stride + token % p.page_size * cache.token_stride;
}

// Token keep[i] moves to position i <= keep[i], so what a round of positions overwrites has been
// read in it or before it. Blocks: sequences times caches times heads times slices of rows.
template <class W>
__global__ void __launch_bounds__(kCompactThreads) compact(const CompactParams p) {
  int64_t block = blockIdx.x;
  const int slice = static_cast<int>(block % p.slices);
  block /= p.slices;
  const int head = static_cast<int>(block % p.heads);
  block /= p.heads;
  const int side = static_cast<int>(block % p.num_caches);
  const int64_t b = block / p.num_caches;
  const CacheBytes& cache = p.caches[side];

  const int words = (cache.words + p.slices - 1) / p.slices, first_word = slice * words;
  const int lanes = 1 << cache.log_lanes, lane = threadIdx.x & (lanes - 1);
  const int per_pass = kCompactThreads >> cache.log_lanes;
  const int64_t length = at(p.seq_lens, b);
  const int64_t list = b * p.keep_sequence_stride + head * p.keep_head_stride;
  char* const rows = cache.data + head * cache.head_stride;
  const auto kept = [&](int64_t i) -> int64_t {
    if (i >= p.most) return -1;
    const int64_t token = integer_at(p.keep, list + i * p.keep.stride);
    return token < length ? token : -1;
  };

  if (side == 0 && head == 0 && slice == 0) {
    int count = 0;
    for (int64_t i = threadIdx.x; i < p.most; i += kCompactThreads) count += kept(i) >= 0;
    for (int step = 16; step > 0; step /= 2) count += __shfl_xor_sync(kWholeWarp, count, step);
    int* const counts = reinterpret_cast<int*>(shared_memory());
    if (threadIdx.x % 32 == 0) counts[threadIdx.x / 32] = count;
    __syncthreads();
    if (threadIdx.x == 0) {
      int total = 0;
      for (int w = 0; w < kCompactThreads / 32; ++w) total += counts[w];
      if (p.wide_lens) {
        static_cast<int64_t*>(p.new_seq_lens)[b] = total;
      } else {
        static_cast<int32_t*>(p.new_seq_lens)[b] = total;
      }
    }
  }

  for (int64_t i0 = 0; i0 < p.most && kept(i0) >= 0; i0 += kPasses * per_pass) {
    for (int w0 = 0; w0 < words; w0 += lanes) {
      const int word = first_word + w0 + lane;
      const bool mine = w0 + lane < words && word < cache.words;
      W held[kPasses];
      int64_t targets[kPasses];
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        const int64_t i = i0 + pass * per_pass + (threadIdx.x >> cache.log_lanes);
        const int64_t token = mine ? kept(i) : -1;
        const int64_t source = place_of(p, cache, b, token);
        targets[pass] = source < 0 || token == i ? -1 : place_of(p, cache, b, i);
        if (targets[pass] >= 0) held[pass] = reinterpret_cast<const W*>(rows + source)[word];
      }
      __syncthreads();
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        if (targets[pass] >= 0) reinterpret_cast<W*>(rows + targets[pass])[word] = held[pass];
      }
    }
  }
}

}  // namespace memkernels::attention::cuda
