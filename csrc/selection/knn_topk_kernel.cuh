// The nearest entries of a bank, exactly:
//
//   value(q, b) = q.b, that over |q| |b|, or -(|q|^2 - 2 q.b + |b|^2), and the k largest of them.
//
// A block owns queries of a head and a stretch of its bank, which it reads tile by tile, each tile
// in slices of the depth, into a pipeline of asynchronous copies; products are tensor cores'. What
// exceeds a query's floor goes to its list; a list that is full is cut back to its best, which
// raises the floor. Of N values some k (1 + ln(N / k)) are written down, never [Q, N]. A second
// kernel sorts the best of a query's lists. Every value is one product in a fixed order and lists
// are ranked by value and index, so that neither stretches nor schedules change a bit.
//
// Cost: the bank, H N D elements of memory for each 128 queries, and 2 Q H N D flops. Up to some
// 100 queries in 16-bit memory is the limit (4.8 TB/s of an H200, of which 85 % are expected); with
// more it is mma.sync, of which about 60 % of the tensor cores' peak are expected, a sixth of that
// in float32: blocks of other queries read the same tiles from L2.
#pragma once

#include "core/cuda/chunk.cuh"
#include "core/cuda/slices.cuh"
#include "selection/knn_topk_cuda.h"
#include "selection/ranked_keys.cuh"

namespace memkernels::selection::cuda {

// How the eight warps of a block share its rows and the entries of a tile.
template <int kRows>
struct SearchShape {
  static constexpr int kWarpsOverRows = kRows == 16 ? 1 : kRows / 32;
  static constexpr int kRowTiles = kRows == 16 ? 1 : 2;  // of 16 rows, of a warp
  static constexpr int kBlocks = 2 * kWarpsOverRows;     // of 8 entries, of a warp
  static constexpr int kStages = stages_of(kRows);
};

// What there is to search of a head's bank.
struct Extent {
  int length;                  // entries that count
  int span, tiles;             // what is cut into tiles: entries, or buckets
  int rounds, part_of_rounds;  // through the buckets, and those of each part
};
__device__ __forceinline__ Extent extent_of(const KnnParams& p, int head) {
  int64_t length = p.num_entries;
  if (p.valid_len.data) {
    length = clamp(at(p.valid_len, head), 0, p.num_entries);
  }
  Extent x{static_cast<int>(length), static_cast<int>(length), 0, 1, 1};
  if (p.buckets > 0) {
    if (p.buckets < x.span) x.span = p.buckets;
    x.rounds = static_cast<int>((length + p.buckets - 1) / p.buckets);
    x.part_of_rounds = (x.rounds + p.parts - 1) / p.parts;
  }
  x.tiles = static_cast<int>((int64_t{x.span} + kEntries - 1) / kEntries);
  return x;
}

// A slice of a tile of entries.
struct Place {
  int tile, round, slice;

  __device__ __forceinline__ void advance(const KnnParams& p, int first_round, int past_round) {
    if (++slice < p.slices) return;
    slice = 0;
    if (++round < past_round) return;
    round = first_round;
    ++tile;
  }
};

// The sum of squares over half a slice of a row.
template <class T>
__device__ __forceinline__ float square_of(const Tile& tile, int row, int half, int chunks) {
  float square = 0.f;
#pragma unroll
  for (int c = 0; c < kSliceBytes / 32; ++c) {
    const int column = kSliceBytes / 32 * half + c;
    if (column >= chunks) break;
    const auto chunk = *reinterpret_cast<const Chunk<T, 16 / sizeof(T)>*>(tile.chunk(row, column));
    float sum = 0.f;
#pragma unroll
    for (const T x : chunk.elements) sum += widen(x) * widen(x);
    square += sum;
  }
  return square;
}

// What a metric wants to know of a vector: |x|^2 or 1 / |x|. Two neighbours have half the sum each.
__device__ __forceinline__ float measure(Metric metric, float square) {
  square += __shfl_xor_sync(kWholeWarp, square, 1);
  if (metric == Metric::l2) return square;
  return square > 0.f ? 1.f / sqrtf(square) : 0.f;
}

__device__ __forceinline__ float rank(Metric metric, float product, float query, float entry) {
  if (metric == Metric::dot) return product;
  if (metric == Metric::cosine) return product * entry * query;
  const float negated = 2.f * product - entry - query;
  return negated > 0.f ? 0.f : negated;
}

// Blocks: stretches times parts times heads times blocks of queries.
template <class T, int kRows, bool kBuckets>
__global__ void __launch_bounds__(kSearchThreads, resident_blocks(sizeof(T), kRows))
    search_bank(const KnnParams p) {
  using S = SearchShape<kRows>;
  constexpr int kStages = S::kStages, kDepth = kSliceBytes / sizeof(T);
  constexpr int kWarps = kSearchThreads / 32, kLanes = kSliceBytes / 16;
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const int warp_row = warp % S::kWarpsOverRows * 16 * S::kRowTiles;
  const int warp_column = warp / S::kWarpsOverRows * 8 * S::kBlocks;

  // Slices of queries [kRows] and entries [kEntries], what is measured of both, floors and counts.
  char* const q_slices = shared_memory();
  char* const slices = q_slices + (p.q_stays ? p.slices : kStages) * kRows * kSliceBytes;
  float* const queries = reinterpret_cast<float*>(slices + kStages * kEntries * kSliceBytes);
  float* const entries = queries + kRows;
  float* const floors = entries + kEntries;
  int* const counts = reinterpret_cast<int*>(floors + kRows);
  int* const full = counts + kRows;  // [2]: the last tile, even or odd, that filled a list

  const int64_t block = blockIdx.x;
  const int first_row = static_cast<int>(block % p.query_blocks) * kRows;
  const int head = static_cast<int>(block / p.query_blocks % p.heads);
  const int64_t list = block / p.query_blocks / p.heads;
  const int stretch = static_cast<int>(list / p.parts), part = static_cast<int>(list % p.parts);
  const int rows = p.num_queries - first_row < kRows ? p.num_queries - first_row : kRows;
  const Extent x = extent_of(p, head);
  const int first_tile = static_cast<int>(int64_t{x.tiles} * stretch / p.stretches);
  const int first_round = part * x.part_of_rounds;
  const int past_round =
      first_round + x.part_of_rounds < x.rounds ? first_round + x.part_of_rounds : x.rounds;
  const int past_tile = first_round < past_round
                            ? static_cast<int>(int64_t{x.tiles} * (stretch + 1) / p.stretches)
                            : first_tile;
  const bool by_bucket = kBuckets && p.distinct > 0;

  const auto keys_of = [&](int row) {
    const int64_t owner = int64_t{first_row + row} * p.heads + head;
    return p.keys + (owner * p.stretches * p.parts + list) * p.room;
  };
  const auto depth_of = [&](int slice) {  // elements
    return p.dim - slice * kDepth < kDepth ? p.dim - slice * kDepth : kDepth;
  };
  const auto q_tile = [&](int slice, int stage) {
    return Tile{q_slices + (p.q_stays ? slice : stage) * kRows * kSliceBytes, kSliceBytes};
  };
  const auto tile_of = [&](int stage) {
    return Tile{slices + stage * kEntries * kSliceBytes, kSliceBytes};
  };

  const T* const q = static_cast<const T*>(p.q) + first_row * p.q_stride + head * p.q_head_stride;
  const T* const bank = static_cast<const T*>(p.bank) + head * p.bank_head_stride;
  Place ahead{first_tile, first_round, 0};
  const auto load = [&](int stage) {
    if (ahead.tile < past_tile) {
      const int column = ahead.slice * kDepth, depth = depth_of(ahead.slice);
      if (!p.q_stays || (ahead.tile == first_tile && ahead.round == first_round)) {
        for (int i = tid / kLanes; i < kRows; i += kSearchThreads / kLanes) {
          copy_slice(q_tile(ahead.slice, stage), i, q + i * p.q_stride + column, depth, p.aligned,
                     i < rows);
        }
      }
#pragma unroll
      for (int i = tid / kLanes; i < kEntries; i += kSearchThreads / kLanes) {
        const int64_t place = int64_t{ahead.tile} * kEntries + i;
        const int64_t entry = int64_t{ahead.round} * p.buckets + place;
        copy_slice(tile_of(stage), i, bank + entry * p.bank_stride + column, depth, p.aligned,
                   place < x.span && entry < x.length);
      }
      ahead.advance(p, first_round, past_round);
    }
    commit_copies();
  };

  for (int i = tid; i < kRows; i += kSearchThreads) {
    floors[i] = i < rows ? -kInfinity : kInfinity;
    counts[i] = 0;
  }
  if (tid < 2) full[tid] = 0;
  for (int stage = 0; stage + 1 < kStages; ++stage) load(stage);

  Sums<S::kRowTiles, S::kBlocks> sums, best;    // best: of each bucket,
  int best_round[S::kRowTiles][S::kBlocks][4];  // and where it was
  float square = 0.f, q_square = 0.f;
  int stage = 0;
  for (Place here{first_tile, first_round, 0}; here.tile < past_tile;
       here.advance(p, first_round, past_round), stage = stage + 1 < kStages ? stage + 1 : 0) {
    wait_copies<kStages - 2>();
    __syncthreads();
    load(stage > 0 ? stage - 1 : kStages - 1);
    const int tiles_before = here.tile - first_tile;
    if (here.slice == 0) {
      sums.clear();
      square = 0.f;
      if (here.round == first_round && tiles_before > 0 &&
          full[(tiles_before - 1) % 2] == tiles_before) {
        for (int row = warp; row < rows; row += kWarps) {
          const int count = counts[row];
          if (count <= p.room - kEntries) continue;
          Key cut;
          const int kept = keep_best(keys_of(row), count, p.least, p.most, cut);
          if (lane == 0) {
            counts[row] = kept;
            floors[row] = value_of(cut);
          }
        }
        __syncthreads();
      }
    }

    const int steps = (depth_of(here.slice) * static_cast<int>(sizeof(T)) + 31) / 32;
    const Tile tile = tile_of(stage), q_slice = q_tile(here.slice, stage);
    const bool first = tiles_before == 0 && here.round == first_round;
    if (p.metric != Metric::dot) {
      square += square_of<T>(tile, tid / 2, tid % 2, 2 * steps);
      if (first && tid / 2 < kRows) q_square += square_of<T>(q_slice, tid / 2, tid % 2, 2 * steps);
    }
    multiply_rows<T>(sums, q_slice, warp_row, tile, warp_column, steps);
    if (here.slice + 1 < p.slices) continue;

    if (p.metric != Metric::dot) {
      const float entry = measure(p.metric, square), query = measure(p.metric, q_square);
      if (tid % 2 == 0) {
        entries[tid / 2] = entry;
        if (first && tid / 2 < kRows) queries[tid / 2] = query;
      }
      __syncthreads();
    }
    // Products become values; those of no entry are never found.
    const int64_t first_place = int64_t{here.tile} * kEntries;
    const int64_t first_entry = int64_t{here.round} * p.buckets + first_place;
    const int64_t places = x.span - first_place, left = x.length - first_entry;
    const int used = static_cast<int>(clamp(places < left ? places : left, 0, kEntries));
#pragma unroll
    for (int i = 0; i < S::kRowTiles * 2; ++i) {
      const int row = warp_row + 8 * i + lane / 4;
      const float query = p.metric == Metric::dot ? 0.f : queries[row];
#pragma unroll
      for (int j = 0; j < S::kBlocks * 2; ++j) {
        const int column = warp_column + 8 * (j / 2) + lane % 4 * 2 + j % 2;
        float& c = sums.c[i / 2][j / 2][i % 2 * 2 + j % 2];
        c = rank(p.metric, c, query, p.metric == Metric::dot ? 0.f : entries[column]);
        if (column >= used) c = -kInfinity;
        if constexpr (kBuckets) {
          float& most = best.c[i / 2][j / 2][i % 2 * 2 + j % 2];
          int& round = best_round[i / 2][j / 2][i % 2 * 2 + j % 2];
          if (here.round == first_round) most = -kInfinity, round = first_round;
          if (c > most) most = c, round = here.round;
        }
      }
    }
    if (here.round + 1 < past_round) continue;

#pragma unroll
    for (int i = 0; i < S::kRowTiles * 2; ++i) {
      const int row = warp_row + 8 * i + lane / 4;
      const float floor = floors[row];
      const auto value = [&](int j) {
        return (kBuckets ? best : sums).c[i / 2][j / 2][i % 2 * 2 + j % 2];
      };
      const auto column_of = [&](int j) {
        return warp_column + 8 * (j / 2) + lane % 4 * 2 + j % 2;
      };
      const auto key = [&](int j) {
        const int64_t round = kBuckets ? best_round[i / 2][j / 2][i % 2 * 2 + j % 2] : 0;
        return key_of(value(j),
                      static_cast<uint32_t>(round * p.buckets + first_place + column_of(j)));
      };
      // Later entries have higher indices, but not so those of later buckets.
      const auto passes = [&](int j) {
        return kBuckets ? value(j) >= floor && value(j) > -kInfinity : value(j) > floor;
      };
      if (by_bucket) {
        Key* const to = keys_of(row) + int64_t{tiles_before} * kEntries;
#pragma unroll
        for (int j = 0; j < S::kBlocks * 2; ++j) {
          if (row < rows && column_of(j) < places) to[column_of(j)] = passes(j) ? key(j) : 0;
        }
        continue;
      }
      int found = 0;
#pragma unroll
      for (int j = 0; j < S::kBlocks * 2; ++j) found += passes(j);
      if (found == 0) continue;
      const int count = atomicAdd(counts + row, found) + found;
      if (count > p.room - kEntries) atomicMax(full + tiles_before % 2, tiles_before + 1);
      Key* to = keys_of(row) + count - found;
#pragma unroll
      for (int j = 0; j < S::kBlocks * 2; ++j) {
        if (passes(j)) *to++ = key(j);
      }
    }
  }

  __syncthreads();
  for (int row = warp; row < rows; row += kWarps) {
    int count = counts[row];
    if (by_bucket) {
      const int64_t places = x.span - int64_t{first_tile} * kEntries;
      count = static_cast<int>(clamp(places, 0, int64_t{past_tile - first_tile} * kEntries));
    } else if (p.stretches > 1 && count > p.most) {
      Key cut;
      count = keep_best(keys_of(row), count, p.least, p.most, cut);
    }
    if (lane == 0 && part == 0) {
      p.counts[(int64_t{first_row + row} * p.heads + head) * p.stretches + stretch] = count;
    }
  }
}

// The best of a query's lists, in order. Blocks: queries times heads.
static __global__ void __launch_bounds__(1024) rank_found(const KnnParams p) {
  const int tid = threadIdx.x, threads = blockDim.x;
  const int64_t row = blockIdx.x;
  Key* const scratch = reinterpret_cast<Key*>(shared_memory());  // [32], of warps
  int* const taken = reinterpret_cast<int*>(scratch + 32);
  Key* const best = p.best ? p.best + row * p.most : scratch + 33;
  const Extent x = extent_of(p, static_cast<int>(row % p.heads));

  const auto block_reduce = [&](Key value, const auto& join) {
    value = warp_reduce(value, join);
    if (tid % 32 == 0) scratch[tid / 32] = value;
    __syncthreads();
    value = scratch[0];
    for (int w = 1; w < threads / 32; ++w) value = join(value, scratch[w]);
    __syncthreads();
    return value;
  };
  // Calls use(list, i, count of the list) for each place, by the same thread every time.
  int team = threads;  // threads of a list
  while (team > 32 && team * p.stretches > threads) team /= 2;
  const auto for_places = [&](const auto& use) {
    for (int s = tid / team; s < p.stretches; s += threads / team) {
      Key* const list = p.keys + (row * p.stretches + s) * p.parts * p.room;
      const int count = p.counts[row * p.stretches + s];
      const int places = p.distinct > 0 && p.distinct < count ? p.distinct : count;
#pragma unroll 4
      for (int i = tid % team; i < places; i += team) use(list, i, count);
    }
  };

  if (p.distinct > 0) {  // the best of all that stand for a bucket, in all parts
    for_places([&](Key* list, int place, int count) {
      Key best = 0;
      for (int part = 0; int64_t{part} * x.part_of_rounds < x.rounds; ++part) {
        for (int i = place; i < count; i += p.distinct) {
          best = Greatest()(best, list[part * p.room + i]);
        }
      }
      list[place] = best;
    });
  }
  if (tid == 0) *taken = 0;
  Key found = 0, lowest = ~Key{0}, highest = 0;
  for_places([&](const Key* list, int i, int) {
    if (list[i] == 0) return;
    ++found;
    lowest = Least()(lowest, list[i]);
    highest = Greatest()(highest, list[i]);
  });
  Key cut = 1;
  if (block_reduce(found, Plus()) > static_cast<Key>(p.most)) {
    lowest = block_reduce(lowest, Least());
    highest = block_reduce(highest, Greatest());
    cut = find_cut(lowest, highest, p.least, p.most, [&](Key from) {
      Key n = 0;
      for_places([&](const Key* list, int i, int) { n += list[i] >= from; });
      return static_cast<int64_t>(block_reduce(n, Plus()));
    });
  }
  for_places([&](const Key* list, int i, int) {
    if (list[i] >= cut) best[atomicAdd(taken, 1)] = list[i];
  });
  __syncthreads();
  const int n = *taken;
  sort_keys(best, n);

  const float sign = p.metric == Metric::l2 ? -1.f : 1.f;
  for (int64_t i = tid; i < p.k; i += threads) {
    const bool any = i < n;
    p.values[row * p.k + i] = any ? sign * value_of(best[i]) + 0.f : -sign * kInfinity;  // no -0
    p.indices[row * p.k + i] = any ? static_cast<int64_t>(index_of(best[i])) : -1;
  }
}

}  // namespace memkernels::selection::cuda
