// I[t, s] = sum_h w[t, h] relu(q[t, h] . k[s]), or -inf where query t does not see key s.
//
// Keys are the rows of the products and heads their columns, so that a sum over heads stays in a
// thread, but for the four lanes that share a row. A block holds its keys in shared memory while
// the heads of its queries pass.
//
// Cost: 2 Hi D flops a score of 4 bytes; bound by mma.sync. Decoding reads K once as well: with 64
// heads in 16 bits 64 flops a byte, so that memory takes about as long as mma.sync.
#pragma once

#include "selection/head_tiles.cuh"

namespace memkernels::selection::cuda {

using attention::cuda::extent_of;
using attention::cuda::first_query;
using attention::cuda::last_at_most;

// Of the only sequence.
static __global__ void write_offsets(int total_q, int64_t* offsets) {
  offsets[0] = 0;
  offsets[1] = total_q;
}

// Some queries of a sequence, in a row.
struct QueryRun {
  int64_t sequence;
  int query, past;  // rows of q
  int shift;        // from a row of q to its position
  int length;       // of the sequence
};

// The run of a slot, which count those of all sequences; false if it has none.
__device__ __forceinline__ bool find_run(const IndexerParams& p, int64_t slot, QueryRun& r) {
  const AttentionParams& a = p.a;
  int64_t b = slot, part = 0;
  if (p.run > 0) {
    const auto first_slot = [&](int64_t i) { return first_query(a, i) / p.run + i; };
    b = last_at_most(a.num_sequences, slot, first_slot);
    part = slot - first_slot(b);
  }
  const int first = first_query(a, b), past = first_query(a, b + 1);
  const int64_t query = first + part * p.run;
  if (part < 0 || query >= past) return false;
  r.sequence = b;
  r.query = static_cast<int>(query);
  r.past = p.run == 0 || past - r.query < p.run ? past : r.query + p.run;
  r.length = extent_of(a, b).length;
  r.shift = r.length - past;
  return true;
}

// Where a key lies; outer -1: nowhere.
struct Place {
  int outer, token;
};
__device__ __forceinline__ Place find_place(const AttentionParams& a, int64_t b, int position) {
  if (!a.page_table.data) return {static_cast<int>(b), position};
  const int64_t page = integer_at(
      a.page_table, b * a.table_row_stride + position / a.page_size * a.page_table.stride);
  if (page < 0 || page >= a.num_pages) return {-1, 0};
  return {static_cast<int>(page), position % a.page_size};
}

// Adds x up over the four lanes of a row, which share out the sums: lane l of them has those from
// l kN / 4 on at the beginning of x.
template <int kN>
__device__ __forceinline__ void add_lanes(float (&x)[kN]) {
  static_assert(kN == 2 || kN == 4 || kN == 8, "the lanes share out 2, 4 or 8 sums");
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) {
    const float mine = lane & 2 ? x[i + kN / 2] : x[i], other = lane & 2 ? x[i] : x[i + kN / 2];
    x[i] = mine + __shfl_xor_sync(kWholeWarp, other, 2);
  }
  if constexpr (kN == 2) {
    x[0] += __shfl_xor_sync(kWholeWarp, x[0], 1);
  } else {
#pragma unroll
    for (int i = 0; i < kN / 4; ++i) {
      const float mine = lane & 1 ? x[i + kN / 4] : x[i], other = lane & 1 ? x[i] : x[i + kN / 4];
      x[i] = mine + __shfl_xor_sync(kWholeWarp, other, 1);
    }
  }
}

// Products of heads beyond the last count as 0: what a key makes of zeros may be NaN.
template <int kTiles, int kBlocks>
__device__ __forceinline__ void clear_padding(Sums<kTiles, kBlocks>& x, int block, int heads) {
  const int first = (heads - 1) % 8 - static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (e % 2 > first) x.c[tile][block][e] = 0.f;
    }
  }
}

// Blocks: tiles of keys times runs of queries. A warp has kTiles times 16 keys.
template <class T, int kTiles, int kColumns>
__global__ void __launch_bounds__(kIndexerThreads, 2) score_keys(const IndexerParams p) {
  constexpr int kKeys = 64 * kTiles, kBlocks = kColumns / 8, kSums = 2 * kTiles;
  const AttentionParams& a = p.a;
  const int tid = threadIdx.x, lane = tid % 32, warp_key = tid / 32 * 16 * kTiles;

  // K [kKeys][D], tiles of heads, their weights, places of the keys.
  char* const memory = shared_memory();
  const Tile keys{memory, pitch_of(a.dim * sizeof(T))};
  char* const tile_memory = memory + kKeys * keys.pitch;
  const int tile_bytes = p.stages * kColumns * keys.pitch;
  float* const weights = reinterpret_cast<float*>(tile_memory + tile_bytes);
  Place* const places = reinterpret_cast<Place*>(weights + 2 * kColumns);

  // Late queries see the most keys; they go first.
  const int64_t block = gridDim.x - 1 - blockIdx.x;
  QueryRun run;
  if (!find_run(p, block / p.key_tiles, run)) return;
  const int first_key = static_cast<int>(block % p.key_tiles) * kKeys;
  const int count = p.num_tokens - first_key < kKeys ? p.num_tokens - first_key : kKeys;
  float* const scores = p.scores + first_key;

  // Queries before the first that sees a key.
  int query = run.query;
  if (first_key >= run.length) {
    query = run.past;
  } else if (a.causal && first_key - run.shift > query) {
    query = first_key - run.shift < run.past ? first_key - run.shift : run.past;
  }
  for (int i = run.query; i < query; ++i) {
    for (int key = tid; key < count; key += kIndexerThreads) {
      scores[int64_t{i} * p.num_tokens + key] = -kInfinity;
    }
  }
  if (query == run.past) return;

  const int visible =
      a.causal && run.past + run.shift < run.length ? run.past + run.shift : run.length;
  for (int i = tid; i < kKeys; i += kIndexerThreads) {
    places[i] = {-1, 0};
    if (first_key + i < visible) places[i] = find_place(a, run.sequence, first_key + i);
  }
  // What lies behind the head dimension takes part in the products.
  const int steps = (a.dim * static_cast<int>(sizeof(T)) + 31) / 32;
  if (a.dim * sizeof(T) % 32 != 0) {
    fill_zeros<kIndexerThreads>(memory, kKeys * keys.pitch + tile_bytes);
  }
  __syncthreads();
  constexpr int kLanes = 8;
  for (int i = tid / kLanes; i < kKeys; i += kIndexerThreads / kLanes) {
    const Place place = places[i];
    const bool used = place.outer >= 0;
    const int64_t offset =
        used ? place.outer * a.k.outer_stride + place.token * a.k.token_stride : 0;
    copy_row<T, kLanes>(keys, i, static_cast<const T*>(a.k.data) + offset, a.dim, tid % kLanes,
                        a.aligned, used);
  }
  HeadTiles<T, kColumns> tiles(p, tile_memory, weights);
  tiles.start(query, run.past - query);

  // The thread's share of the warp's scores, and the first query that sees each.
  constexpr int kKept = kTiles == 1 ? 1 : kSums / 4;
  const int first_kept = warp_key + lane % 4 * kSums / 4 * 8 + lane / 4;
  const auto seen_from = [&](int key) { return a.causal ? first_key + key - run.shift : 0; };
  int seen[kKept];
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const int key = first_kept + 8 * i;
    seen[i] = places[key].outer < 0 ? attention::cuda::kNoLimit : seen_from(key);
  }
  const bool stores = kTiles > 1 || lane % 2 == 0;

  Sums<kTiles, kBlocks> x;
  float sums[kSums] = {};
  int left = p.head_blocks;  // of the query
  for (; tiles.more(); tiles.finish()) {
    wait_copies<0>();
    __syncthreads();
    tiles.advance();
    x.clear();
    if (first_key + warp_key < visible && query + kBlocks > seen_from(warp_key)) {
      multiply_rows<T>(x, keys, warp_key, tiles.heads(), 0, steps);
    }
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      if (query == run.past) break;
      if (left == 1 && a.num_heads % 8 != 0) clear_padding(x, block, a.num_heads);
      const PairOfWeights w = tiles.weights(block);
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        const float (&c)[4] = x.c[i / 2][block];
        sums[i] += w.first * relu(c[i % 2 * 2]);
        sums[i] += w.second * relu(c[i % 2 * 2 + 1]);
      }
      if (--left > 0) continue;
      add_lanes(sums);
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
        const int key = first_kept + 8 * i;
        if (stores && key < count) {
          scores[int64_t{query} * p.num_tokens + key] = query >= seen[i] ? sums[i] : -kInfinity;
        }
      }
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[i] = 0.f;
      left = p.head_blocks;
      ++query;
    }
  }
}

}  // namespace memkernels::selection::cuda
