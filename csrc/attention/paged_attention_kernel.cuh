// Attention over an indexed stream of keys.
//
//   logit = scale q.k, soft-capped, plus key_bias;  out = softmax(logit) v;  lse = log sum exp
//
// A block owns kRows rows, queries times heads of one KV head, and splits of their keys, which it
// reads once for all of them (key_stream.cuh). Scores and values are multiplied on tensor
// cores: warps share the keys of the scores, then the columns of the values. Where rows are few,
// the last of the blocks that share their splits to store its own merges them all, in their order.
//
// Cost: (D + Dv) elements of memory and 2 (D + Dv) kRows flops a key and KV head. In decoding with
// groups of 4 in 16-bit that is 8 flops a byte used of 32 issued; an H200 has some 200 (4.8 TB/s,
// dense 990 Tflop/s), so memory is the limit: 85 % of its copy bandwidth is expected, some 75 %
// where rows of 256 bytes lie apart. Multi-head latent attention (128 heads on one) issues 240
// flops a byte and is bound by mma.sync, at about 60 % of the tensor cores' peak.
#pragma once

#include "attention/key_stream.cuh"
#include "core/cuda/chunk.cuh"

namespace memkernels::attention::cuda {

// How a block of kRows rows shares its work among warps: over rows, and over the keys of scores and
// the columns of values.
template <class T, int kDim, int kRows>
struct Shape {
  static constexpr int kWarpsOverKeys = kRows == 16 ? 4 : kDim > 256 ? 2 : 1;
  static constexpr int kRowTiles = kRows == 128 ? 2 : 1;  // of 16 rows, of a warp
  static constexpr int kThreads = 2 * kRows / kRowTiles * kWarpsOverKeys;
  static constexpr int kKeys = keys_of_tile(sizeof(T), kDim);
  static constexpr int kKeyBlocks = (kKeys / 8 + kWarpsOverKeys - 1) / kWarpsOverKeys;
  static constexpr int kColumnBlocks = kDim / 8 / kWarpsOverKeys;
  static constexpr int kScorePitch = kKeys + 8;
};

// What a row's weighted sum of values is multiplied with, and its lse.
struct Outcome {
  float factor, lse;
};

// From the greatest logit, base 2, and the sum of powers relative to it. The sink, a natural logit,
// joins the sum here: relative to the greatest, so that large logits cost no precision.
__device__ __forceinline__ Outcome finish_row(float maximum, float sum, bool has_sink, float sink) {
  if (maximum == -kInfinity && sum == 0.f) return {0.f, has_sink ? sink : -kInfinity};
  if (!has_sink) return {1.f / sum, (maximum + log2f(sum)) * kLn2};
  const float most = fmaxf(maximum, sink * kLog2e), kept = exp2f(maximum - most);
  const float total = sum * kept + exp2f(sink * kLog2e - most);
  return {kept / total, (most + log2f(total)) * kLn2};
}

template <class T>
__device__ __forceinline__ float sink_of(const AttentionParams& p, int head) {
  return p.sink_logit ? companion_at<T>(p.sink_logit, p.sink_is_float, head * p.sink_stride) : 0.f;
}

// Of a thread's rows: kRowTiles times two.
template <int kTiles>
struct RowStates {
  float maximum[kTiles][2];  // of the logits, base 2
  float sum[kTiles][2];      // of the thread's own columns
};

// Products of queries and keys become logits, base 2, where rows see keys; else -inf.
template <class Tiles, int kTiles, int kBlocks>
__device__ __forceinline__ void finish_logits(Sums<kTiles, kBlocks>& x, const AttentionParams& p,
                                              const Stream& s, const Tiles& tiles, int first_block,
                                              const int (&position)[kTiles][2], bool seen_whole) {
#pragma unroll
  for (int i = 0; i < kTiles * kBlocks * 4; ++i) {
    x.c[i / 4 / kBlocks][i / 4 % kBlocks][i % 4] *= p.scale;
  }
  if (p.softcap > 0) {
#pragma unroll
    for (int i = 0; i < kTiles * kBlocks * 4; ++i) {
      float& c = x.c[i / 4 / kBlocks][i / 4 % kBlocks][i % 4];
      c = p.softcap * tanhf(c / p.softcap);
    }
  }
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      Key key{0, 0, 0, 0.f};
      if (!seen_whole) {
        key = tiles.place(8 * (first_block + block) + static_cast<int>(threadIdx.x) % 4 * 2 + e);
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& c = x.c[tile][block][2 * half + e];
          const bool seen = seen_whole || sees(p, s, position[tile][half], key.position);
          c = seen ? c * kLog2e + key.bias : -kInfinity;
        }
      }
    }
  }
}

// Positions of a thread's rows.
template <int kTiles>
__device__ __forceinline__ void find_positions(int (&position)[kTiles][2], const AttentionParams& p,
                                               const Stream& s, int warp_row) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = s.first_row + warp_row + 16 * tile + 8 * half + threadIdx.x % 32 / 4;
      position[tile][half] = s.first_position + row / p.group;
    }
  }
}

// Of 16 rows, a warp's own blocks of scores to shared memory, and those of all warps back.
template <int kPitch, int kBlocks>
__device__ __forceinline__ void store_scores(float* scores, const Sums<1, kBlocks>& x, int warp_row,
                                             int first_block) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      scores[(warp_row + lane / 4 + e / 2 * 8) * kPitch + 8 * (first_block + block) + lane % 4 * 2 +
             e % 2] = x.c[0][block][e];
    }
  }
}
template <int kPitch, int kBlocks>
__device__ __forceinline__ void load_scores(const float* scores, Sums<1, kBlocks>& x,
                                            int warp_row) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      x.c[0][block][e] =
          scores[(warp_row + lane / 4 + e / 2 * 8) * kPitch + 8 * block + lane % 4 * 2 + e % 2];
    }
  }
}

// Copies rows of queries, or of what has their shape, into a tile.
template <class T, int kLanes, int kRows, int kThreads>
__device__ __forceinline__ void load_queries(const Tile& tile, const AttentionParams& p,
                                             const Stream& s, int head, const void* data,
                                             int64_t stride, int64_t head_stride, int dim,
                                             bool aligned) {
  for (int r = threadIdx.x / kLanes; r < kRows; r += kThreads / kLanes) {
    const int row = s.first_row + r, query = row / p.group;
    const T* from = static_cast<const T*>(data) + (s.query + int64_t{query}) * stride +
                    (head * p.group + row % p.group) * head_stride;
    copy_row<T, kLanes>(tile, r, from, dim, threadIdx.x % kLanes, aligned, query < s.num_queries);
  }
}

// Whether this block is the last of those that share the splits of its rows to have stored theirs;
// it sees what all of them have stored.
__device__ __forceinline__ bool arrives_last(const AttentionParams& p, const Stream& s,
                                             int64_t rows_of_head, int* scratch) {
  __syncthreads();
  if (threadIdx.x == 0) {
    const int blocks = s.num_splits < p.split_blocks ? s.num_splits : p.split_blocks;
    __threadfence();
    *scratch = atomicAdd(&p.arrivals[rows_of_head], 1) == blocks - 1;
    __threadfence();
  }
  __syncthreads();
  return *scratch;
}

// Merges the splits of a block's rows, in their order; a warp has 128 columns of a row at a time,
// part `first` and every `step`-th of those.
template <class T, int kRows>
__device__ __forceinline__ void merge_splits(const AttentionParams& p, const Stream& s, int head,
                                             int first, int step) {
  const int lane = threadIdx.x % 32, n = s.num_splits, chunks = (p.dim_v + 127) / 128;
  const int left = s.num_queries * p.group - s.first_row, rows = left < kRows ? left : kRows;
  for (int part = first; part < rows * chunks; part += step) {
    const int row = s.first_row + part / chunks, column = part % chunks * 128 + 4 * lane;
    const int query = row / p.group, q_head = head * p.group + row % p.group;
    const int64_t partial = ((s.partial + query) * p.num_heads + q_head) * p.splits;
    PartialState state{-kInfinity, 0.f};  // of split `lane`
    if (lane < n) state = p.partial_states[partial + lane];
    const float most = warp_max(state.maximum);
    const float weight = exp2f(state.maximum - (most == -kInfinity ? 0.f : most));
    float sum = 0.f;
    for (int i = 0; i < n; ++i) {
      sum += __shfl_sync(kWholeWarp, weight, i) * __shfl_sync(kWholeWarp, state.sum, i);
    }
    const Outcome outcome = finish_row(most, sum, p.sink_logit != nullptr, sink_of<T>(p, q_head));

    const int64_t to = (s.query + int64_t{query}) * p.num_heads + q_head;
    if (column == 0) p.lse[to] = outcome.lse;
    T* const out = static_cast<T*>(p.out) + to * p.dim_v;
    const float* const outs = p.partial_out + partial * p.dim_v;
    const bool whole = p.dim_v % 4 == 0 && column < p.dim_v;
    float x[4] = {};
#pragma unroll 8
    for (int i = 0; i < n; ++i) {
      const float w = __shfl_sync(kWholeWarp, weight, i);
      const float* const from = outs + int64_t{i} * p.dim_v + column;
      Chunk<float, 4> four{};
      if (whole) {
        four = *reinterpret_cast<const Chunk<float, 4>*>(from);
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (column + j < p.dim_v) four.elements[j] = from[j];
        }
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) x[j] += w * four.elements[j];
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) x[j] *= outcome.factor;
    if (whole) {
      store_pair(out + column, x[0], x[1]);
      store_pair(out + column + 2, x[2], x[3]);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (column + j < p.dim_v) narrow(x[j], out[column + j]);
      }
    }
  }
}

// The same by blocks of their own, where it is more than a block should do: `blocks` of four warps
// for those rows of a head.
template <class T, int kRows>
__global__ void __launch_bounds__(kMergeThreads, 1)
    merge_rows(const AttentionParams p, int blocks) {
  const int head = static_cast<int>(blockIdx.x / blocks % p.num_kv_heads);
  Stream s;
  if (!find_stream<kRows, kMergeThreads>(p, blockIdx.x / blocks / p.num_kv_heads, 0, head,
                                         reinterpret_cast<int*>(shared_memory()), s) ||
      s.num_splits == 1) {
    return;
  }
  constexpr int kWarps = kMergeThreads / 32;
  const int first = static_cast<int>(blockIdx.x % blocks) * kWarps + threadIdx.x / 32;
  merge_splits<T, kRows>(p, s, head, first, blocks * kWarps);
}

template <class T, int kDim, int kRows>
__global__ void __launch_bounds__(Shape<T, kDim, kRows>::kThreads, 1)
    attend(const AttentionParams p) {
  using S = Shape<T, kDim, kRows>;
  using Tiles = KeyTiles<T, kDim, S::kKeys, S::kThreads>;
  constexpr int kRowTiles = S::kRowTiles, kKeyBlocks = S::kKeyBlocks;
  const int tid = threadIdx.x, lane = tid % 32;
  const int warp_row = tid / 32 / S::kWarpsOverKeys * 16 * kRowTiles;
  const int warp_column = tid / 32 % S::kWarpsOverKeys;

  // q [kRows][D], tiles of keys and values, their places, scores [kRows][kKeys + 8].
  char* const memory = shared_memory();
  const Tile q{memory, pitch_of(p.dim * sizeof(T))};
  char* const tile_memory = memory + kRows * q.pitch;
  const int tile_bytes = p.stages * Tiles::tile_bytes(p);
  Key* const places = reinterpret_cast<Key*>(tile_memory + tile_bytes);
  float* const scores =
      reinterpret_cast<float*>(reinterpret_cast<char*>(places) + Tiles::place_bytes(p));

  // Late blocks of rows see the most keys; they go first.
  const int64_t block = gridDim.x - 1 - blockIdx.x;
  const int head = static_cast<int>(block % p.num_kv_heads);
  const int first_split = static_cast<int>(block / p.num_kv_heads % p.split_blocks);
  const int64_t slot = block / p.num_kv_heads / p.split_blocks;
  int* const scratch = reinterpret_cast<int*>(places);
  Stream s;
  if (!find_stream<kRows, S::kThreads>(p, slot, first_split, head, scratch, s)) return;

  // What lies behind the head dimension takes part in the scores' products.
  const int steps = (p.dim * static_cast<int>(sizeof(T)) + 31) / 32;
  if (p.dim * sizeof(T) % 32 != 0) {
    fill_zeros<S::kThreads>(memory, kRows * q.pitch + tile_bytes);
    __syncthreads();
  }
  load_queries<T, Tiles::kLanes, kRows, S::kThreads>(q, p, s, head, p.q, p.q_stride,
                                                     p.q_head_stride, p.dim, p.aligned);
  int position[kRowTiles][2];
  find_positions(position, p, s, warp_row);
  const int first_seen = s.first_position + (s.first_row + warp_row) / p.group;
  const int last_seen = s.first_position + (s.first_row + warp_row + 16 * kRowTiles - 1) / p.group;
  const int first_column = 8 * warp_column * S::kColumnBlocks;
  const bool leader = warp_column == 0 && lane % 4 == 0;

  const auto attend_split = [&](int split) {
    enter_split(s, split);
    Tiles tiles(p, s, head, tile_memory, places, false);
    tiles.start();
    Sums<kRowTiles, S::kColumnBlocks> out;
    out.clear();
    RowStates<kRowTiles> state;
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
      state.maximum[tile][0] = state.maximum[tile][1] = -kInfinity;
      state.sum[tile][0] = state.sum[tile][1] = 0.f;
    }

    for (; tiles.more(); tiles.finish()) {
      tiles.wait();
      __syncthreads();
      tiles.advance();
      const bool seen_whole = tiles.seen_whole(first_seen, last_seen);

      Sums<kRowTiles, S::kKeys / 8> x;
      if constexpr (S::kWarpsOverKeys == 1) {
        x.clear();
        multiply_rows<T>(x, q, warp_row, tiles.keys(), 0, steps);
        finish_logits(x, p, s, tiles, 0, position, seen_whole);
      } else {
        // Each warp has the scores of its own keys, and needs those of all.
        const int first_block = warp_column * kKeyBlocks;
        if (8 * first_block < S::kKeys) {
          Sums<1, kKeyBlocks> part;
          part.clear();
          multiply_rows<T>(part, q, warp_row, tiles.keys(), 8 * first_block, steps);
          finish_logits(part, p, s, tiles, first_block, position, seen_whole);
          store_scores<S::kScorePitch>(scores, part, warp_row, first_block);
        }
        __syncthreads();
        load_scores<S::kScorePitch>(scores, x, warp_row);
      }

      // Softmax, by every warp for its rows.
#pragma unroll
      for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float most = state.maximum[tile][half];
#pragma unroll
          for (int block = 0; block < S::kKeys / 8; ++block) {
            most = fmaxf(most, fmaxf(x.c[tile][block][2 * half], x.c[tile][block][2 * half + 1]));
          }
          most = fmaxf(most, __shfl_xor_sync(kWholeWarp, most, 1));
          most = fmaxf(most, __shfl_xor_sync(kWholeWarp, most, 2));
          const float base = most == -kInfinity ? 0.f : most;
          const float kept = exp2_fast(state.maximum[tile][half] - base);
          state.maximum[tile][half] = most;
          float sum = 0.f;
#pragma unroll
          for (int block = 0; block < S::kKeys / 8; ++block) {
#pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; ++e) {
              x.c[tile][block][e] = exp2_fast(x.c[tile][block][e] - base);
              sum += x.c[tile][block][e];
            }
          }
          state.sum[tile][half] = state.sum[tile][half] * kept + sum;
#pragma unroll
          for (int block = 0; block < S::kColumnBlocks; ++block) {
            out.c[tile][block][2 * half] *= kept;
            out.c[tile][block][2 * half + 1] *= kept;
          }
        }
      }
      multiply_columns<T>(out, x, tiles.values(), 0, warp_column * S::kColumnBlocks, p.dim_v);
    }

#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = state.sum[tile][half];
        sum += __shfl_xor_sync(kWholeWarp, sum, 1);
        sum += __shfl_xor_sync(kWholeWarp, sum, 2);
        const int row = s.first_row + warp_row + 16 * tile + 8 * half + lane / 4;
        const int query = row / p.group, q_head = head * p.group + row % p.group;
        if (query >= s.num_queries) continue;
        const float maximum = state.maximum[tile][half];
        if (s.num_splits > 1) {
          const int64_t partial = ((s.partial + query) * p.num_heads + q_head) * p.splits + split;
          if (leader) p.partial_states[partial] = {maximum, sum};
          store_row(p.partial_out + partial * p.dim_v, out.c[tile], half, 1.f, first_column,
                    p.dim_v);
        } else {
          const Outcome outcome =
              finish_row(maximum, sum, p.sink_logit != nullptr, sink_of<T>(p, q_head));
          const int64_t to = (s.query + int64_t{query}) * p.num_heads + q_head;
          if (leader) p.lse[to] = outcome.lse;
          store_row(static_cast<T*>(p.out) + to * p.dim_v, out.c[tile], half, outcome.factor,
                    first_column, p.dim_v);
        }
      }
    }
  };
  // What a loop keeps alive does not fit into the registers of larger blocks; they have one split.
  if constexpr (kRows == 16) {
    for (int split = first_split; split < s.num_splits; split += p.split_blocks) {
      if (split != first_split) __syncthreads();  // tiles and places are free again
      attend_split(split);
    }
  } else {
    attend_split(first_split);
  }
  if constexpr (kRows == 16) {
    if (s.num_splits > 1 && p.arrivals &&
        arrives_last(p, s, slot * p.num_kv_heads + head, scratch)) {
      merge_splits<T, kRows>(p, s, head, tid / 32, S::kThreads / 32);
    }
  }
}

}  // namespace memkernels::attention::cuda
