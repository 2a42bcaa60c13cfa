// stats[b, h, j] = reduce over queries i and heads of the group of exp(logit_ij - lse_i).
//
// A block owns kKeys keys of a sequence and KV head, and walks over the rows, queries times heads,
// that see them. Keys are the rows of the products, so that a thread reduces its own columns and
// then four lanes theirs; rows fall to lanes by their number in the sequence, so that neither the
// shape of blocks nor other sequences change a bit.
//
// Cost: 2 D flops and an exponential a pair of row and key that see each other, over D elements of
// memory a key and KV head, which limit decoding: blocks are short, and those that share a
// multiprocessor ask for some 100 KiB of keys together. Prefill is bound by mma.sync, whose eight
// products take four ldmatrix (half of the tensor cores' peak at best, with D = 128), and, close
// by, by exponentials.
#pragma once

#include <type_traits>

#include "attention/paged_attention_kernel.cuh"
#include "selection/attention_colstats_cuda.h"

namespace memkernels::selection::cuda {

// A row, as tiles of keys see it.
struct alignas(16) SeeingRow {
  float lse;      // base 2
  float least;    // probability that counts
  int low, high;  // sees keys before `high` that are not before `low`, or are sinks
};

// Calls run with an integral_constant.
template <class Run>
__device__ __forceinline__ void with_reduce(ColumnReduce reduce, const Run& run) {
  switch (reduce) {
    case ColumnReduce::sum:
      return run(std::integral_constant<ColumnReduce, ColumnReduce::sum>());
    case ColumnReduce::max:
      return run(std::integral_constant<ColumnReduce, ColumnReduce::max>());
    case ColumnReduce::count:
      return run(std::integral_constant<ColumnReduce, ColumnReduce::count>());
  }
}

template <ColumnReduce kReduce>
__device__ __forceinline__ float join(float x, float y) {
  if constexpr (kReduce == ColumnReduce::max) return y > x || y != y ? y : x;  // a NaN stays
  return x + y;
}

// Joins the products of a warp's keys, from `first` on, and a tile of rows to a thread's columns.
template <ColumnReduce kReduce, bool kSeenWhole, int kTiles, int kBlocks>
__device__ __forceinline__ void add_rows(float (&stats)[kTiles][2],
                                         const Sums<kTiles, kBlocks>& products,
                                         const SeeingRow* rows, int first, int sinks,
                                         const float (&bias)[kTiles][2], float scale) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    const SeeingRow* const pair = rows + 8 * block + lane % 4 * 2;
    const SeeingRow row[2] = {pair[0], pair[1]};
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int key = first + 16 * tile + 8 * half + lane / 4;
        float x[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float logit = products.c[tile][block][2 * half + e] * scale + bias[tile][half];
          const bool seen = kSeenWhole || (key < row[e].high && (key >= row[e].low || key < sinks));
          const float weight = exp2_fast(logit - row[e].lse);
          if constexpr (kReduce == ColumnReduce::count) {
            x[e] = seen && weight >= row[e].least && logit != -kInfinity ? 1.f : 0.f;
          } else {
            x[e] = seen ? weight : 0.f;
          }
        }
        stats[tile][half] = join<kReduce>(stats[tile][half], join<kReduce>(x[0], x[1]));
      }
    }
  }
}

// That registers allow a multiprocessor.
template <class T, int kRows>
inline constexpr int kColstatsBlocks = sizeof(T) == 4 ? 3
                                       : kRows == 16  ? 7
                                                      : 4;

// Keys from `first` on, of a sequence of that length.
template <class T, int kKeys, int kRows>
__device__ __forceinline__ void find_stats(const ColstatsParams& params, int64_t b, int head,
                                           int first, int length) {
  constexpr int kThreads = kColstatsThreads, kLanes = 8;
  constexpr int kTiles = kKeys / (kThreads / 2);  // of 16 keys, of a warp
  const AttentionParams& p = params.a;
  const int tid = threadIdx.x, lane = tid % 32;

  // Keys [kKeys][D], two tiles of queries [kRows][D], what these see, places of the keys.
  char* const memory = shared_memory();
  const int pitch = pitch_of(p.dim * sizeof(T));
  const Tile keys{memory, pitch};
  char* const queries = memory + kKeys * pitch;
  SeeingRow* const rows = reinterpret_cast<SeeingRow*>(queries + 2 * kRows * pitch);
  Key* const places = reinterpret_cast<Key*>(rows + 2 * kRows);

  // Queries [begin, end) of the sequence may see any of the keys.
  Stream s{};
  s.row = b;
  s.visible = s.end = length;
  s.query = first_query(p, b);
  const int count = p.cu_seqlens_q.data
                        ? static_cast<int>(clamp(first_query(p, b + 1) - s.query, 0, p.total_q))
                        : 1;
  const int window = window_of(p, head);
  s.first_position = length - count;
  int64_t begin = p.causal ? int64_t{first} - s.first_position : 0, end = count;
  if (first >= p.sink_tokens) {
    end = clamp(int64_t{first} + kKeys - 1 + window - s.first_position, 0, count);
  }
  begin = clamp(begin, 0, count);
  s.num_queries = static_cast<int>(end);
  const int past = s.num_queries * p.group;
  const int end_tile = (past + kRows - 1) / kRows;
  int tile = static_cast<int>(begin) * p.group / kRows;

  const auto find_row = [&](int of_tile) {
    SeeingRow row{0.f, 0.f, 0, 0};
    const int r = of_tile * kRows + tid;
    if (tid >= kRows || r >= past) return row;
    const int query = r / p.group, q_head = head * p.group + r % p.group;
    const float lse =
        params
            .lse[(s.query + int64_t{query}) * params.lse_stride + q_head * params.lse_head_stride];
    if (lse == -kInfinity) return row;
    const int position = s.first_position + query;
    const int64_t low = int64_t{position} - window + 1;
    const bool given = params.threshold == params.threshold;
    row.lse = lse * kLog2e;
    row.least =
        given ? params.threshold : 1.f / static_cast<float>(position > 0 ? position + 1 : 1);
    row.low = static_cast<int>(low > 0 ? low : 0);
    row.high = p.causal && position + 1 < length ? position + 1 : length;
    return row;
  };
  const auto load = [&](int of_tile) {
    if (of_tile < end_tile) {
      s.first_row = of_tile * kRows;
      load_queries<T, kLanes, kRows, kThreads>({queries + of_tile % 2 * kRows * pitch, pitch}, p, s,
                                               head, p.q, p.q_stride, p.q_head_stride, p.dim,
                                               p.aligned);
    }
    commit_copies();
  };
  const auto keep = [&](int of_tile, const SeeingRow& row) {
    if (tid < kRows) rows[of_tile % 2 * kRows + tid] = row;
  };

  if (tid < kKeys) places[tid] = find_key<T>(p, s, head, first + tid, -1);
  const int steps = (p.dim * static_cast<int>(sizeof(T)) + 31) / 32;
  if (p.dim * sizeof(T) % 32 != 0) fill_zeros<kThreads>(memory, (kKeys + 2 * kRows) * pitch);
  keep(tile, find_row(tile));
  SeeingRow next = find_row(tile + 1);
  __syncthreads();
  for (int i = tid / kLanes; i < kKeys && tile < end_tile; i += kThreads / kLanes) {
    const Key key = places[i];
    if (key.position < 0) continue;  // nobody uses its products
    const T* const row = static_cast<const T*>(p.k.data) + key.outer * p.k.outer_stride +
                         key.token * p.k.token_stride + head * p.k.head_stride;
    copy_row<T, kLanes>(keys, i, row, p.dim, tid % kLanes, p.aligned, true);
  }
  load(tile);

  const int warp_key = tid / 32 * 16 * kTiles, own_key = warp_key + lane / 4;
  const int first_key = first + warp_key;
  const int last_key = first_key + 16 * kTiles < length ? first_key + 16 * kTiles - 1 : length - 1;
  const float scale = p.softcap > 0 ? kLog2e : p.scale * kLog2e;
  float bias[kTiles][2], stats[kTiles][2];
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      bias[t][half] = places[own_key + 16 * t + 8 * half].bias;
      stats[t][half] = 0.f;
    }
  }

  for (; tile < end_tile; ++tile) {
    wait_copies<0>();
    __syncthreads();
    keep(tile + 1, next);
    next = find_row(tile + 2);
    load(tile + 1);

    const SeeingRow* const seeing = rows + tile % 2 * kRows;
    const SeeingRow one = seeing[lane % kRows];
    const bool by_any = one.high > first_key && (one.low <= last_key || first_key < p.sink_tokens);
    if (!__any_sync(kWholeWarp, by_any)) continue;
    const bool by_all = one.high > last_key && (one.low <= first_key || last_key < p.sink_tokens);
    const bool seen_whole = __all_sync(kWholeWarp, by_all);

    Sums<kTiles, kRows / 8> x;
    x.clear();
    multiply_rows<T>(x, keys, warp_key, {queries + tile % 2 * kRows * pitch, pitch}, 0, steps);
    if (p.softcap > 0) {
#pragma unroll
      for (int i = 0; i < kTiles * kRows / 2; ++i) {
        float& c = x.c[i / (kRows / 2)][i / 4 % (kRows / 8)][i % 4];
        c = p.softcap * tanhf(c * p.scale / p.softcap);
      }
    }
    const auto add = [&](auto reduce) {
      constexpr ColumnReduce kReduce = decltype(reduce)::value;
      if (seen_whole) {
        add_rows<kReduce, true>(stats, x, seeing, first_key, p.sink_tokens, bias, scale);
      } else {
        add_rows<kReduce, false>(stats, x, seeing, first_key, p.sink_tokens, bias, scale);
      }
    };
    with_reduce(params.reduce, add);
  }

  with_reduce(params.reduce, [&](auto reduce) {
    constexpr ColumnReduce kReduce = decltype(reduce)::value;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x = stats[t][half];
        x = join<kReduce>(x, __shfl_xor_sync(kWholeWarp, x, 1));
        x = join<kReduce>(x, __shfl_xor_sync(kWholeWarp, x, 2));
        const int key = own_key + 16 * t + 8 * half;
        if (lane % 4 > 0 || first + key >= length) continue;
        if (places[key].position < 0) x = 0.f;
        float& out = params.stats[(b * p.num_kv_heads + head) * params.stats_stride + first + key];
        out = params.accumulate ? join<kReduce>(params.decay * out, x) : x;
      }
    }
  });
}

// A block has every `blocks`-th tile of the keys of its sequence and head. The first keys see the
// most queries; they go first.
template <class T, int kKeys, int kRows>
__global__ void __launch_bounds__(kColstatsThreads, (kColstatsBlocks<T, kRows>))
    find_colstats(const ColstatsParams params, int blocks) {
  const AttentionParams& p = params.a;
  const int head = static_cast<int>(blockIdx.x % p.num_kv_heads);
  const int64_t b = blockIdx.x / p.num_kv_heads % p.num_sequences;
  const int64_t tile = blockIdx.x / p.num_kv_heads / p.num_sequences;
  const int length = extent_of(p, b).length;
  for (int64_t first = tile * kKeys; first < length; first += int64_t{blocks} * kKeys) {
    find_stats<T, kKeys, kRows>(params, b, head, static_cast<int>(first), length);
    __syncthreads();
  }
}

}  // namespace memkernels::selection::cuda
