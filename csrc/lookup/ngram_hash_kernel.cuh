// rows[h] = mix mod m_h + offset_h, mix = xor over j < n of id[t - j] * multiplier_j, in wrapping
// int64; -1 where one of these ids is negative. A modulus below 1 counts as 1.
//
// A block mixes a tile of tokens for each order in shared memory; then each of its threads has one
// head for all of them, so that it divides but once, for 2^64 / m: with u = mix, or ~mix where mix
// is negative, the upper half of u * floor((2^64 - 1) / m) is floor(u / m) or one less.
//
// Cost: 8 bytes written a result, ids read once. Some 25 instructions a result, where a 64-bit
// modulo takes about a hundred and an H200 issues 50 while it writes one: bound by memory.
#pragma once

#include "core/cuda/device.cuh"
#include "lookup/ngram_hash_cuda.h"

namespace memkernels::lookup::cuda {

// The n-grams that end at a token.
struct Grams {
  const NgramHashParams& p;
  int64_t sequence, start, row;  // row: of token_ids
  int64_t token;                 // of the row

  __device__ __forceinline__ Grams(const NgramHashParams& params, int64_t index) : p(params) {
    if (p.cu_seqlens.data) {
      int64_t low = 0, high = p.num_sequences - 1;
      while (low < high) {
        const int64_t middle = low + (high - low + 1) / 2;
        at(p.cu_seqlens, middle) <= index ? low = middle : high = middle - 1;
      }
      const int64_t offset = at(p.cu_seqlens, low);
      sequence = low;
      start = offset < 0 ? 0 : offset < index ? offset : index;
      row = 0;
      token = index;
    } else {
      sequence = row = index / p.length;
      start = 0;
      token = index % p.length;
    }
  }

  __device__ __forceinline__ int64_t id(int64_t j) const {  // j tokens earlier
    const int64_t place = token - j, before = start - place;
    if (before <= 0) return integer_at(p.ids, row * p.ids_row_stride + place * p.ids.stride);
    if (!p.past_ids.data) return p.pad_id;
    const int64_t column = p.reach - before;
    return integer_at(p.past_ids, sequence * p.past_row_stride + column * p.past_ids.stride);
  }

  // Whether there is one of that order.
  __device__ __forceinline__ bool mix(int64_t order, uint64_t& mixed) const {
    mixed = 0;
    bool hidden = false;
    for (int64_t j = 0; j < order; ++j) {
      const int64_t one = hidden ? p.eos_id : id(j);
      if (one < 0) return false;
      mixed ^= static_cast<uint64_t>(one) * static_cast<uint64_t>(at(p.multipliers, j));
      hidden |= j > 0 && one == p.eos_id;
    }
    return true;
  }
};

struct Head {
  uint64_t modulus, inverse;
  int64_t offset;

  __device__ __forceinline__ Head(const NgramHashParams& p, int64_t head) {
    const int64_t m = at(p.moduli, head);
    modulus = m < 1 ? 1 : m;
    inverse = ~uint64_t{0} / modulus;
    offset = at(p.offsets, head);
  }

  __device__ __forceinline__ int64_t row(uint64_t mixed) const {
    const bool negative = static_cast<int64_t>(mixed) < 0;
    const uint64_t u = negative ? ~mixed : mixed;
    uint64_t r = u - __umul64hi(u, inverse) * modulus;
    r = r < modulus ? r : r - modulus;
    return static_cast<int64_t>((negative ? modulus - 1 - r : r) + static_cast<uint64_t>(offset));
  }
};

static __global__ void __launch_bounds__(kHashThreads, kHashBlocks)
    hash_ngrams(const NgramHashParams p) {
  const auto mixes = reinterpret_cast<uint64_t*>(shared_memory());  // [orders, tokens]
  const auto found = reinterpret_cast<int*>(mixes + p.num_orders * kHashTokens);
  const int chunk = blockIdx.x % p.chunks * kHashThreads;
  const int left = p.num_orders * p.heads - chunk,
            width = left < kHashThreads ? left : kHashThreads;
  const int side = kHashThreads / width;  // tokens side by side
  const int head = chunk + threadIdx.x % width, order = head / p.heads;
  const Head mine(p, p.first + head);

  const int64_t step = int64_t{gridDim.x} / p.chunks * kHashTokens;
  for (int64_t begin = int64_t{blockIdx.x} / p.chunks * kHashTokens; begin < p.tokens;
       begin += step) {
    const int tokens =
        p.tokens - begin < kHashTokens ? static_cast<int>(p.tokens - begin) : kHashTokens;
    __syncthreads();  // the last tile is done
    for (int i = threadIdx.x; i < p.num_orders * kHashTokens; i += kHashThreads) {
      if (i % kHashTokens >= tokens) continue;
      found[i] = Grams(p, begin + i % kHashTokens).mix(p.orders[i / kHashTokens], mixes[i]);
    }
    __syncthreads();
    int t = threadIdx.x / width;
    if (t >= side) continue;
    for (; t < tokens; t += side) {
      const int i = order * kHashTokens + t;
      p.rows[(begin + t) * p.width + p.first + head] = found[i] ? mine.row(mixes[i]) : -1;
    }
  }
}

}  // namespace memkernels::lookup::cuda
