// The k best of s1[i] + s2[j] over all i, j < N, with s1 = q1 . K1 and s2 = q2 . K2. They are among
// the pairs of the k best of each half; with both in order, among those of ranks r1 r2 <= k.
//
// A block multiplies 32 tokens with the keys of a half of a head, or of a stretch of them, tile by
// tile; a warp compares a token's scores of a tile with a floor, and adds those above it to the
// token's list, which is cut back to its best when it is full: that raises the floor. A second
// kernel makes pairs of the k best of both halves, a warp for each token and head. Each score is
// one product in a fixed order, and all choices are by value and index: so neither stretches nor
// schedules change a bit.
//
// Cost: 4 N Dk flops a token and head, and 16 k bytes that pass from one kernel to the other. On an
// H200 a half's keys, N Dk elements for each 32 tokens, come from L2 (5.5 TB/s); to choose the best
// of 1024 keys takes some 1000 instructions of a warp, as long as to read those of 128 elements of
// 16 bits. The two overlap, as two blocks share a multiprocessor: of 4096 tokens and 8 heads some
// 150 us are expected, and 30 us for the pairs. In float32 the products need some 200 us.
#pragma once

#include "core/cuda/chunk.cuh"
#include "core/cuda/ranked_keys.cuh"
#include "core/cuda/slices.cuh"
#include "lookup/product_key_topk_cuda.h"

namespace memkernels::lookup::cuda {

// Blocks: tiles of tokens, times stretches, times halves, times heads.
template <class T>
__global__ void __launch_bounds__(kSearchThreads, kSearchBlocks)
    search_half(const ProductKeyParams p) {
  constexpr int kDepth = kSliceBytes / sizeof(T), kLanes = kSliceBytes / 16;
  constexpr int kWarps = kSearchThreads / 32, kBlocks = kTileKeys / kWarps / 8;
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;

  // Slices of queries [kRows] and keys [kTileKeys], scores [kRows][kTileKeys], what is kept of each
  // row.
  char* const q_slices = shared_memory();
  char* const slices = q_slices + (p.q_stays ? p.slices : p.stages) * kRows * kSliceBytes;
  const Tile scores{slices + p.stages * kTileKeys * kSliceBytes, kTileKeys * 4};
  float* const floors = reinterpret_cast<float*>(scores.data + kRows * scores.pitch);
  int* const counts = reinterpret_cast<int*>(floors + kRows);
  Key* const lists = reinterpret_cast<Key*>(counts + kRows);

  int64_t block = blockIdx.x;
  const int row_tiles = (p.tokens + kRows - 1) / kRows;
  const int first_row = static_cast<int>(block % row_tiles) * kRows;
  block /= row_tiles;
  const int stretch = static_cast<int>(block % p.stretches);
  block /= p.stretches;
  const int half = static_cast<int>(block % 2), head = static_cast<int>(block / 2);
  const int rows = p.tokens - first_row < kRows ? p.tokens - first_row : kRows;
  const int tiles = (p.size + kTileKeys - 1) / kTileKeys;
  const int first_tile = tiles * stretch / p.stretches;
  const int past_tile = tiles * (stretch + 1) / p.stretches;

  const auto depth_of = [&](int slice) {  // elements
    return p.dim - slice * kDepth < kDepth ? p.dim - slice * kDepth : kDepth;
  };
  const auto q_tile = [&](int slice, int stage) {
    return Tile{q_slices + (p.q_stays ? slice : stage) * kRows * kSliceBytes, kSliceBytes};
  };
  const auto tile_of = [&](int stage) {
    return Tile{slices + stage * kTileKeys * kSliceBytes, kSliceBytes};
  };

  const T* const query = static_cast<const T*>(p.query) + first_row * p.query_stride +
                         head * p.query_head_stride + half * p.query_half_stride;
  const T* const keys =
      static_cast<const T*>(p.keys) + head * p.key_head_stride + half * p.key_half_stride;
  int ahead_tile = first_tile, ahead_slice = 0;
  const auto load = [&](int stage) {
    if (ahead_tile < past_tile) {
      const int column = ahead_slice * kDepth, depth = depth_of(ahead_slice);
      if (!p.q_stays || ahead_tile == first_tile) {
        const int i = tid / kLanes;
        const bool used = i < rows;
        copy_slice(q_tile(ahead_slice, stage), i, query + (used ? i : 0) * p.query_stride + column,
                   depth, p.aligned, used);
      }
#pragma unroll
      for (int i = tid / kLanes; i < kTileKeys; i += kSearchThreads / kLanes) {
        const int key = ahead_tile * kTileKeys + i;
        const bool used = key < p.size;
        copy_slice(tile_of(stage), i, keys + (used ? key : 0) * p.key_stride + column, depth,
                   p.aligned, used);
      }
      if (++ahead_slice == p.slices) ahead_slice = 0, ++ahead_tile;
    }
    commit_copies();
  };

  if (tid < kRows) floors[tid] = -kInfinity, counts[tid] = 0;
  for (int stage = 0; stage + 1 < p.stages; ++stage) load(stage);

  Sums<kRows / 16, kBlocks> sums;
  int stage = 0;
  for (int tile = first_tile; tile < past_tile; ++tile) {
    sums.clear();
    for (int slice = 0; slice < p.slices; ++slice) {
      if (p.stages == kMostStages) {
        wait_copies<kMostStages - 2>();
      } else {
        wait_copies<0>();
      }
      __syncthreads();
      load(stage > 0 ? stage - 1 : p.stages - 1);
      const int steps = (depth_of(slice) * static_cast<int>(sizeof(T)) + 31) / 32;
      multiply_rows<T>(sums, q_tile(slice, stage), 0, tile_of(stage), warp * 8 * kBlocks, steps);
      stage = stage + 1 < p.stages ? stage + 1 : 0;
    }
    // Those of no key are never found.
    const int used = p.size - tile * kTileKeys;
#pragma unroll
    for (int i = 0; i < kRows / 8; ++i) {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        const int column = 8 * (warp * kBlocks + b) + lane % 4 * 2;
        const float* const c = sums.c[i / 2][b] + i % 2 * 2;
        *scores.element<Chunk<float, 2>>(8 * i + lane / 4, column / 2) = {
            column < used ? c[0] : -kInfinity, column + 1 < used ? c[1] : -kInfinity};
      }
    }
    __syncthreads();
    for (int row = warp; row < rows; row += kWarps) {
      const auto scored = *reinterpret_cast<const Chunk<float, 4>*>(scores.chunk(row, lane));
      // An equal score has a higher index than all before it.
      const float floor = floors[row];
      Key fresh[4];
      bool any = false;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool passes = scored.elements[i] > floor;
        any |= passes;
        fresh[i] = passes ? key_of(scored.elements[i], tile * kTileKeys + 4 * lane + i) : 0;
      }
      if (!__any_sync(kWholeWarp, any)) continue;
      BestKeys best{lists + row * p.room, p.room, counts[row]};
      Key cut;
      const bool raised = best.add(fresh, p.k, cut);
      if (lane == 0) {
        counts[row] = best.count;
        if (raised) floors[row] = value_of(cut);
      }
      __syncwarp();
    }
  }

  for (int row = warp; row < rows; row += kWarps) {
    BestKeys best{lists + row * p.room, p.room, counts[row]};
    best.keep(p.k);
    const int64_t owner = (int64_t{first_row + row} * p.heads + head) * 2 + half;
    Key* const list = p.lists + (owner * p.stretches + stretch) * p.k;
    best.rank([&](int rank, Key key) { list[rank] = key; });
    for (int i = best.count + lane; i < p.k; i += 32) list[i] = 0;
  }
}

// A warp for each token and head.
static __global__ void __launch_bounds__(kMergeThreads) merge_halves(const ProductKeyParams p) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, k = p.k;
  const int64_t row = int64_t{blockIdx.x} * (kMergeThreads / 32) + warp;
  if (row >= int64_t{p.tokens} * p.heads) return;
  Key* const memory = reinterpret_cast<Key*>(shared_memory()) + warp * (2 * k + p.merge_room);
  Key* const firsts = memory;
  Key* const seconds = memory + k;
  BestKeys best{seconds + k, k + kSpareKeys, 0};

  for (int half = 0; half < 2; ++half) {
    Key* const to = half == 0 ? firsts : seconds;
    const int64_t found = int64_t{p.stretches} * k;
    const Key* const from = p.lists + (row * 2 + half) * found;
    if (p.stretches == 1) {
      for (int i = lane; i < k; i += 32) to[i] = from[i];
      continue;
    }
    best.count = 0;
    Key floor = 0;
    for (int64_t first = 0; first < found; first += 128) {
      Key fresh[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const int64_t i = first + 32 * w + lane;
        fresh[w] = i < found ? from[i] : 0;
        if (fresh[w] < floor) fresh[w] = 0;
      }
      best.add(fresh, k, floor);
    }
    best.keep(k);
    best.rank([&](int rank, Key key) { to[rank] = key; });
    for (int i = best.count + lane; i < k; i += 32) to[i] = 0;
    __syncwarp();
  }
  __syncwarp();

  // What is missing is NaN, and so are its sums: they exceed nothing.
  const auto sum = [&](int i, int j) { return value_of(firsts[i]) + value_of(seconds[j]); };
  // Pairs of ranks up to i + 1 and k / (i + 1), rounded up, are k that reach the sum of the last.
  float bound = -kGreatest;
  for (int i = lane; i < k; i += 32) {
    const float last = sum(i, (k + i) / (i + 1) - 1);
    if (last > bound) bound = last;
  }
  bound = warp_max(bound);
  const auto pair = [&](int i, int j) {
    const float x = sum(i, j);
    const uint32_t index = index_of(firsts[i]) * static_cast<uint32_t>(p.size);
    return x >= bound ? key_of(x, index + index_of(seconds[j])) : 0;
  };
  best = {seconds + k, p.merge_room, 0};
  for (int i = 0; (i + 1) * (i + 1) <= k; ++i) {
    for (int j = i + lane; (j - lane + 1) * (i + 1) <= k; j += 32) {
      Key fresh[2] = {};
      if ((j + 1) * (i + 1) <= k) {
        fresh[0] = pair(i, j);
        if (j > i) fresh[1] = pair(j, i);
      }
      Key floor;
      best.add(fresh, k, floor);  // never full
    }
  }
  best.keep(k);
  float* const scores = p.scores + row * k;
  int64_t* const indices = p.indices + row * k;
  best.rank([&](int rank, Key key) {
    scores[rank] = value_of(key);
    indices[rank] = index_of(key);
  });
  for (int i = best.count + lane; i < k; i += 32) {
    scores[i] = -kInfinity;
    indices[i] = -1;
  }
}

}  // namespace memkernels::lookup::cuda
