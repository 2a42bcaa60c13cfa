// score = reduce over the group of scale * (q . summary), where for "minmax" a query is the row
// [min(q, 0), max(q, 0)] beside [minima, maxima]: one dot product of twice the width.
//
// A warp multiplies 16 summaries with the queries of a block on tensor cores. The order of channels
// is free as long as both sides agree, so a thread takes 16 neighbouring bytes of a summary
// straight from memory into its fragments.
//
// Cost: every summary is read once for the whole group and a few queries, 2 group flops a byte of
// 16-bit, so that decoding is bound by memory: 4 KB are in flight a warp, and 80 % of an H200's
// copy bandwidth is expected.
#pragma once

#include "core/cuda/tile.cuh"
#include "selection/score_pages_cuda.h"

namespace memkernels::selection::cuda {

// Bytes from one query to the next: four lanes read 64 bytes of each, two queries all banks.
__host__ __device__ __forceinline__ int query_pitch(int64_t width_bytes) {
  return static_cast<int>(((width_bytes + 63) / 64 | 1) * 64);
}

struct alignas(16) Words {
  uint32_t w[4];
};

// 16 bytes of a row from element `at` on; zeros beyond its end and where there is no row.
template <class T>
__device__ __forceinline__ Words load_words(const T* row, int at, int width, bool aligned) {
  constexpr int kElements = 16 / sizeof(T);
  Words words{};
  if (row == nullptr) return words;
  if (aligned && at + kElements <= width) return *reinterpret_cast<const Words*>(row + at);
  T* const elements = reinterpret_cast<T*>(&words);
  for (int e = 0; e < kElements; ++e) {
    if (at + e < width) elements[e] = row[at + e];
  }
  return words;
}

__device__ __forceinline__ float query_element(const ScoreParams& p, int64_t offset) {
  switch (p.q_dtype) {
    case Dtype::bf16:
      return widen(static_cast<const bf16*>(p.q)[offset]);
    case Dtype::f16:
      return widen(static_cast<const f16*>(p.q)[offset]);
    default:
      return static_cast<const float*>(p.q)[offset];
  }
}

// The queries of a block, which are neighbours in their sequence.
struct Queries {
  int first, count;
  int64_t sequence, position, length;  // of the first query, and of the sequence
};

__device__ __forceinline__ Queries find_queries(const ScoreParams& p, int64_t slot) {
  Queries queries{static_cast<int>(slot), 1, slot, 0, 0};
  int of_sequence = 1, skipped = 0;
  if (p.cu_seqlens_q.data) {
    const auto first_of = [&](int64_t b) {
      return static_cast<int>(clamp(at(p.cu_seqlens_q, b), 0, p.total_q));
    };
    const auto first_slot = [&](int64_t b) { return first_of(b) / p.queries + b; };
    const int64_t b = last_at_most(p.num_sequences, slot, first_slot);
    of_sequence = first_of(b + 1) - first_of(b);
    skipped = static_cast<int>(slot - first_slot(b)) * p.queries;
    const int left = skipped < 0 ? 0 : of_sequence - skipped;
    queries = {first_of(b) + skipped, left < p.queries ? left : p.queries, b, 0, 0};
  }
  queries.length = clamp(at(p.seq_lens, queries.sequence), 0, p.max_pages * p.page_size);
  queries.position = queries.length - of_sequence + skipped;
  return queries;
}

// Of kColumns query heads from `first` on, what summaries are multiplied with.
template <class T>
__device__ __forceinline__ void stage_queries(const ScoreParams& p, const Queries& queries,
                                              int head, int first, int columns, char* to,
                                              int pitch) {
  const int rows = queries.count * p.group, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int elements = pitch / static_cast<int>(sizeof(T));
  for (int c = warp; c < columns; c += kScoreWarps) {
    const int row = first + c;
    T* const out = reinterpret_cast<T*>(to + c * pitch);
    const int64_t offset = (queries.first + int64_t{row / p.group}) * p.q_stride +
                           (head * p.group + row % p.group) * p.q_head_stride;
    for (int e = lane; e < elements; e += 32) {
      float x = 0.f;
      if (row < rows && e < p.width) {
        x = query_element(p, offset + (e < p.dim ? e : e - p.dim));
        // What is negative beside minima, what is positive beside maxima; a NaN beside both.
        if (p.minmax && (e < p.dim ? x > 0.f : x < 0.f)) x = 0.f;
      }
      narrow(x, out[e]);
    }
  }
}

// Adds the products of 16 summaries, of which this thread's are `rows`, with staged queries.
template <class T, int kBlocks>
__device__ __forceinline__ void multiply_pages(const ScoreParams& p, const T* const (&rows)[2],
                                               const char* q, int pitch,
                                               float (&sums)[kBlocks][4]) {
  constexpr int kElements = 16 / sizeof(T), kAtOnce = 4;
  const int lane = threadIdx.x % 32;
  const char* const column = q + lane / 4 * pitch + lane % 4 * 16;
  const int steps = (p.width + 4 * kElements - 1) / (4 * kElements);
  for (int step = 0; step < steps; step += kAtOnce) {
    Words a[kAtOnce][2];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int from = (4 * (step + i) + lane % 4) * kElements;
        a[i][half] = load_words(rows[half], from, p.width, p.aligned);
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (step + i >= steps) break;
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        const Words b =
            *reinterpret_cast<const Words*>(column + 8 * block * pitch + (step + i) * 64);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t left[4] = {a[i][0].w[2 * half], a[i][1].w[2 * half],
                                    a[i][0].w[2 * half + 1], a[i][1].w[2 * half + 1]};
          const uint32_t right[2] = {b.w[2 * half], b.w[2 * half + 1]};
          multiply_add(T(), sums[block], left, right);
        }
      }
    }
  }
}

template <class T, int kBlocks>
__global__ void __launch_bounds__(32 * kScoreWarps, kBlocks == 1 ? 2 : 1)
    score_pages(const ScoreParams p) {
  constexpr int kColumns = 8 * kBlocks, kScorePitch = kColumns + 1;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int head = static_cast<int>(blockIdx.x % p.kv_heads);
  const int tile = static_cast<int>(blockIdx.x / p.kv_heads % p.page_tiles);
  const Queries queries = find_queries(p, blockIdx.x / p.kv_heads / p.page_tiles);
  if (queries.count <= 0) return;
  const int64_t first_page = int64_t{tile} * kBlockPages + warp * kWarpPages;

  // q [kColumns][pitch], scores [kScoreWarps][16][kScorePitch].
  const int pitch = query_pitch(p.width * sizeof(T));
  char* const q = shared_memory();
  float* const scores =
      reinterpret_cast<float*>(q + kColumns * pitch) + warp * kWarpPages * kScorePitch;

  // Columns of the page table that some query sees.
  const auto visible_at = [&](int query) {
    const int64_t position = queries.position + query;
    const int64_t tokens =
        p.causal && position + 1 < queries.length ? position + 1 : queries.length;
    return tokens <= 0 ? 0 : (tokens + p.page_size - 1) / p.page_size;
  };
  const int64_t visible = visible_at(queries.count - 1);
  const auto page_of = [&](int64_t column) {
    if (column >= visible) return int64_t{-1};
    const int64_t page = integer_at(
        p.page_table, queries.sequence * p.table_row_stride + column * p.page_table.stride);
    return page < p.num_pages ? page : int64_t{-1};
  };
  const T* rows[2];
  for (int half = 0; half < 2; ++half) {
    const int64_t page = page_of(first_page + lane / 4 + 8 * half);
    rows[half] =
        page < 0 ? nullptr
                 : static_cast<const T*>(p.summary) + page * p.page_stride + head * p.head_stride;
  }

  const float share = p.reduce == GroupReduce::mean ? p.scale / p.group : p.scale;
  const int64_t page = first_page + lane % kWarpPages;
  const bool absent = page_of(page) < 0;
  float value = 0.f;
  // More than one round only where a group does not fit into the columns, a single query then.
  for (int first = 0; first == 0 || first < queries.count * p.group; first += kColumns) {
    if (int64_t{tile} * kBlockPages < visible) {
      if (first > 0) __syncthreads();
      stage_queries<T>(p, queries, head, first, kColumns, q, pitch);
      __syncthreads();
      float sums[kBlocks][4] = {};
      multiply_pages<T, kBlocks>(p, rows, q, pitch, sums);
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          scores[(lane / 4 + e / 2 * 8) * kScorePitch + 8 * block + lane % 4 * 2 + e % 2] =
              sums[block][e];
        }
      }
      __syncwarp();
    }
    for (int i = lane / kWarpPages; i < queries.count; i += 32 / kWarpPages) {
      const bool hidden = absent || page >= visible_at(i);
      for (int g = first; g < p.group && g < first + kColumns && !hidden; ++g) {
        const float other =
            scores[lane % kWarpPages * kScorePitch + i * p.group + g - first] * share;
        if (g == 0) {
          value = other;
        } else if (p.reduce != GroupReduce::max) {
          value += other;
        } else if (other > value || other != other) {  // a NaN stays
          value = other;
        }
      }
      if (page < p.max_pages && p.group - first <= kColumns) {
        p.scores[(int64_t{queries.first + i} * p.kv_heads + head) * p.max_pages + page] =
            hidden ? -kInfinity : value;
      }
    }
    __syncwarp();
  }
}

}  // namespace memkernels::selection::cuda
