// The backward of the indexer's scores. With S = q . k and G = dI where S > 0 and the query sees
// the key, else 0:
//
//   dw[t, h] = sum_s dI[t, s] relu(S[t, h, s]);  dq[t, h] = w[t, h] sum_s G[t, h, s] k[s]
//   dk[s] = sum_{t, h} w[t, h] G[t, h, s] q[t, h]
//
// S is computed twice, by blocks of queries' heads, which own dq and dw, and by blocks of keys,
// which own dk; so no sum is shared. A page that several sequences hold is one block's, which walks
// over its entries in the order of a stable sort.
//
// Cost: 8 D flops for a head and key, four forwards: bound by mma.sync.
#pragma once

#include "attention/paged_attention_kernel.cuh"
#include "selection/head_tiles.cuh"

namespace memkernels::selection::cuda {

using attention::cuda::extent_of;
using attention::cuda::first_query;

// Blocks: of kTiles times 64 queries' heads, times slices of the head dimension.
template <class T, int kTiles, int kKeys>
__global__ void __launch_bounds__(kIndexerThreads, 1) find_dq(const IndexerBackwardParams params) {
  constexpr int kRows = 64 * kTiles;
  using Tiles = attention::cuda::KeyTiles<T, 256 / sizeof(T), kKeys, kIndexerThreads>;
  using attention::cuda::Key;
  const AttentionParams& p = params.s.a;
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16 * kTiles;

  // q [kRows][D], tiles of keys, their places.
  char* const memory = shared_memory();
  const Tile q{memory, pitch_of(p.dim * sizeof(T))};
  char* const tile_memory = memory + kRows * q.pitch;
  const int tile_bytes = p.stages * Tiles::tile_bytes(p);
  Key* const places = reinterpret_cast<Key*>(tile_memory + tile_bytes);

  const int slices = params.dq ? (p.dim + kIndexerSlice - 1) / kIndexerSlice : 1;
  const int64_t block = gridDim.x - 1 - blockIdx.x;
  const int slice = static_cast<int>(block % slices);
  attention::cuda::Stream s;
  if (!attention::cuda::find_stream<kRows, kIndexerThreads>(p, block / slices, 0, 0,
                                                            reinterpret_cast<int*>(places), s)) {
    return;
  }
  enter_split(s, 0);
  const int steps = (p.dim * static_cast<int>(sizeof(T)) + 31) / 32;
  if (p.dim * sizeof(T) % 32 != 0) {
    fill_zeros<kIndexerThreads>(memory, kRows * q.pitch + tile_bytes);
    __syncthreads();
  }
  attention::cuda::load_queries<T, Tiles::kLanes, kRows, kIndexerThreads>(
      q, p, s, 0, p.q, p.q_stride, p.q_head_stride, p.dim, p.aligned);
  Tiles tiles(p, s, 0, tile_memory, places, true);
  tiles.start();

  int position[kTiles][2];
  attention::cuda::find_positions(position, p, s, warp_row);
  const float* dscores[kTiles][2];  // null: no query
#pragma unroll
  for (int i = 0; i < 2 * kTiles; ++i) {
    const int query = (s.first_row + warp_row + 8 * i + lane / 4) / p.group;
    dscores[i / 2][i % 2] = nullptr;
    if (query < s.num_queries) {
      dscores[i / 2][i % 2] = params.s.scores + (s.query + int64_t{query}) * params.s.num_tokens;
    }
  }
  const bool one_query =
      (s.first_row + warp_row) / p.group == (s.first_row + warp_row + 16 * kTiles - 1) / p.group;

  Sums<kTiles, kIndexerSlice / 8> dq;
  dq.clear();
  float dw[kTiles][2] = {};
  const int first_block = slice * kIndexerSlice / 8;
  for (; tiles.more(); tiles.finish()) {
    tiles.wait();
    __syncthreads();
    tiles.advance();
    Sums<kTiles, kKeys / 8> x;
    x.clear();
    multiply_rows<T>(x, q, warp_row, tiles.keys(), 0, steps);
#pragma unroll
    for (int block = 0; block < kKeys / 8; ++block) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int key = tiles.place(8 * block + lane % 4 * 2 + e).position;
        float dscore = 0.f;
#pragma unroll
        for (int i = 0; i < 2 * kTiles; ++i) {
          if (i == 0 || !one_query) {
            const float* const row = dscores[i / 2][i % 2];
            dscore = row && sees(p, s, position[i / 2][i % 2], key) ? row[key] : 0.f;
          }
          float& c = x.c[i / 2][block][i % 2 * 2 + e];
          const float g = c <= 0.f ? 0.f : dscore;
          dw[i / 2][i % 2] += g == 0.f ? 0.f : g * c;
          c = g;
        }
      }
    }
    if (params.dq) multiply_columns<T>(dq, x, tiles.keys(), 0, first_block, p.dim);
  }
#pragma unroll
  for (int i = 0; i < 2 * kTiles; ++i) {
    float sum = dw[i / 2][i % 2];
    sum += __shfl_xor_sync(kWholeWarp, sum, 1);
    sum += __shfl_xor_sync(kWholeWarp, sum, 2);
    const int row = s.first_row + warp_row + 8 * i + lane / 4;
    const int query = row / p.group, head = row % p.group;
    if (query >= s.num_queries) continue;
    const int64_t to = (s.query + int64_t{query}) * p.num_heads + head;
    if (params.dq) {
      store_row(static_cast<T*>(params.dq) + to * p.dim, dq.c[i / 2], i % 2,
                weight_at<T>(params.s, s.query + query, head), 8 * first_block, p.dim);
    }
    if (!params.dw || slice > 0 || lane % 4 > 0) continue;
    if (params.s.w_is_float) {
      static_cast<float*>(params.dw)[to] = sum;
    } else {
      narrow(sum, static_cast<T*>(params.dw)[to]);
    }
  }
}

// Blocks: of kTiles times 64 keys of a page or sequence, times parts of the queries, times slices
// of the head dimension.
template <class T, int kTiles, int kColumns>
__global__ void __launch_bounds__(kIndexerThreads, 1) find_dk(const IndexerBackwardParams params) {
  constexpr int kKeys = 64 * kTiles, kBlocks = kColumns / 8, kSums = 2 * kTiles;
  const IndexerParams& p = params.s;
  const AttentionParams& a = p.a;
  const int tid = threadIdx.x, lane = tid % 32, warp_key = tid / 32 * 16 * kTiles;

  // K [kKeys][D], tiles of heads, their weights.
  char* const memory = shared_memory();
  const Tile keys{memory, pitch_of(a.dim * sizeof(T))};
  char* const tile_memory = memory + kKeys * keys.pitch;
  const int tile_bytes = p.stages * kColumns * keys.pitch;
  float* const weights = reinterpret_cast<float*>(tile_memory + tile_bytes);

  const int slices = (a.dim + kIndexerSlice - 1) / kIndexerSlice;
  const int slice = static_cast<int>(blockIdx.x % slices);
  const int part = static_cast<int>(blockIdx.x / slices % params.parts);
  const int64_t owner = blockIdx.x / slices / params.parts;
  const int64_t unit = owner / params.parts_of_unit;
  const int first = static_cast<int>(owner % params.parts_of_unit) * kKeys;
  const int count = a.page_size - first < kKeys ? a.page_size - first : kKeys;

  const int steps = (a.dim * static_cast<int>(sizeof(T)) + 31) / 32;
  if (a.dim * sizeof(T) % 32 != 0) {
    fill_zeros<kIndexerThreads>(memory, kKeys * keys.pitch + tile_bytes);
    __syncthreads();
  }
  constexpr int kLanes = 8;
  for (int i = tid / kLanes; i < kKeys; i += kIndexerThreads / kLanes) {
    const bool used = i < count;
    copy_row<T, kLanes>(keys, i,
                        static_cast<const T*>(a.k.data) + unit * a.k.outer_stride +
                            (first + (used ? i : 0)) * a.k.token_stride,
                        a.dim, tid % kLanes, a.aligned, used);
  }

  HeadTiles<T, kColumns> tiles(p, tile_memory, weights);
  Sums<kTiles, kIndexerSlice / 8> dk;
  dk.clear();
  int used = 0;  // keys that any query sees
  int entry = params.run_begin ? params.run_begin[unit] : 0;
  const int end = params.run_begin ? params.run_begin[unit + 1] : 1;
  for (; entry < end; ++entry) {
    int64_t b = unit;
    int base = first;  // position of the block's first key
    if (params.run_begin) {
      b = params.entries[entry] / params.columns;
      base += params.entries[entry] % params.columns * a.page_size;
    }
    const int length = extent_of(a, b).length, past = first_query(a, b + 1);
    const int shift = length - past;  // from a row of q to its position
    int begin = first_query(a, b);
    if (a.causal && base - shift > begin) begin = base - shift;
    if (base >= length || begin >= past) continue;
    used = length - base > used ? length - base : used;
    const int64_t queries = past - begin;
    int query = begin + static_cast<int>(queries * part / params.parts);
    const int last = begin + static_cast<int>(queries * (part + 1) / params.parts) - 1;
    if (query > last) continue;

    // The gradient of the scores of a query and the thread's keys.
    float dscores[kSums], next[kSums];
    const auto read = [&](float (&to)[kSums], int row) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        const int key = warp_key + 8 * i + lane / 4, position = base + key;
        const bool seen =
            key < count && position < length && (!a.causal || position <= row + shift);
        to[i] = seen ? p.scores[int64_t{row} * p.num_tokens + position] : 0.f;
      }
    };
    read(next, query);
    __syncthreads();
    tiles.start(query, last + 1 - query);
    int left = 0;  // blocks of the query
    for (; tiles.more(); tiles.finish()) {
      wait_copies<0>();
      __syncthreads();
      tiles.advance();
      Sums<kTiles, kBlocks> x;
      x.clear();
      if (warp_key >= count) continue;
      multiply_rows<T>(x, keys, warp_key, tiles.heads(), 0, steps);
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        if (left == 0) {
#pragma unroll
          for (int i = 0; i < kSums; ++i) dscores[i] = next[i];
          if (query < last) read(next, ++query);
          left = p.head_blocks;
        }
        --left;
        const PairOfWeights w = tiles.weights(block);
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
          float (&c)[4] = x.c[i / 2][block];
          float &one = c[i % 2 * 2], &other = c[i % 2 * 2 + 1];
          one = one <= 0.f ? 0.f : w.first * dscores[i];
          other = other <= 0.f ? 0.f : w.second * dscores[i];
        }
      }
      multiply_columns<T>(dk, x, tiles.heads(), 0, slice * kIndexerSlice / 8, a.dim);
    }
  }

#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    const int key = warp_key + 8 * i + lane / 4;
    if (key >= count) continue;
    if (key >= used) {
#pragma unroll
      for (int block = 0; block < kIndexerSlice / 8; ++block) {
        dk.c[i / 2][block][i % 2 * 2] = dk.c[i / 2][block][i % 2 * 2 + 1] = 0.f;
      }
    }
    const int64_t tokens = int64_t{a.num_pages} * a.page_size;
    const int64_t token = unit * a.page_size + first + key;
    if (params.parts > 1) {
      store_row(params.partial_dk + (part * tokens + token) * a.dim, dk.c[i / 2], i % 2, 1.f,
                slice * kIndexerSlice, a.dim);
    } else {
      store_row(static_cast<T*>(params.dk) + token * a.dim, dk.c[i / 2], i % 2, 1.f,
                slice * kIndexerSlice, a.dim);
    }
  }
}

// A thread an element of dk.
template <class T>
__global__ void __launch_bounds__(256)
    add_parts(const float* partial_dk, int parts, int64_t n, T* dk) {
  const int64_t i = int64_t{blockIdx.x} * 256 + threadIdx.x;
  if (i >= n) return;
  float sum = 0.f;
  for (int part = 0; part < parts; ++part) sum += partial_dk[part * n + i];
  narrow(sum, dk[i]);
}

}  // namespace memkernels::selection::cuda
