// Chunks of tokens, one after the other, names as in chunk_cpu.h:
//   U = beta V - (beta k before) S, solved (delta rule; else U = V)
//   O = (scale q before) S + scores U
//   S = total S + (k after)^T U
// A warp has 16 columns of V, and everything transposed: S^T stays in its registers as sums of
// products, and is their left operand, as U^T is; what its chunk's tokens share lies in tiles. So
// warps need nothing from one another, and no bit depends on how V is cut.
//
// Cost: 4 K V + C V flops a token and head, with the delta rule 2 K V + 3 C V more: bound by
// mma.sync. q, k, v are read and O is written once, q and k once for each block of columns; beside
// them 2 C + 4 C bytes a token and head of scores and of what is to be solved.
#pragma once

#include <type_traits>

#include "core/cuda/chunk.cuh"
#include "scan/chunk_kernel.cuh"

namespace memkernels::scan::cuda {

inline constexpr int kWalkWarps = 8;  // at most
inline constexpr int kWarpValues = 16;

// The tiles of a chunk.
template <class T, int kDim>
struct ChunkTiles {
  static constexpr int kTokens = chunk_tokens(sizeof(T), kDim);

  Tile reads, erases, writes, v, scores, solve;
  float *factors, *totals;  // kDim totals, zeros beyond K
  int bytes;

  // warps: of the block.
  __host__ __device__ __forceinline__ ChunkTiles(char* memory, const ChunkParams& p, int warps) {
    bytes = 0;
    const auto take = [&](int count) {
      char* const data = memory + bytes;
      bytes += count;
      return data;
    };
    const auto tile = [&](int64_t row_bytes) {
      const int pitch = pitch_of(row_bytes);
      return Tile{take(kTokens * pitch), pitch};
    };
    reads = tile(p.keys * sizeof(T));
    writes = tile(p.keys * sizeof(T));
    erases = p.channels && p.prepared.solve ? tile(p.keys * sizeof(T)) : writes;
    v = tile(warps * kWarpValues * sizeof(T));
    scores = tile(kTokens * sizeof(T));
    solve = p.prepared.solve ? tile(kTokens * sizeof(float)) : Tile{nullptr, 0};
    factors = reinterpret_cast<float*>(take(4 * kTokens * sizeof(float)));
    totals = reinterpret_cast<float*>(take(kDim * sizeof(float)));
  }

  // Starts copying a chunk's, and its columns of V from `first` on.
  __device__ __forceinline__ void start(const ChunkParams& p, int64_t number, const ChunkOf& chunk,
                                        int head, int first, int values) const {
    const int64_t unit = number * p.heads + head;
    if (p.prepared.rows) {
      const int64_t size = int64_t{kTokens} * p.row;
      const T* const rows = static_cast<const T*>(p.prepared.rows) + unit * 3 * size;
      copy_rows<T>(reads, kTokens, kTokens, rows, p.row, p.row, true);
      if (p.channels && p.prepared.solve) {
        copy_rows<T>(erases, kTokens, kTokens, rows + size, p.row, p.row, true);
      }
      copy_rows<T>(writes, kTokens, kTokens, rows + 2 * size, p.row, p.row, true);
    } else {
      const int shared = head / p.group;
      copy_rows<T>(reads, kTokens, chunk.count, row_at<T>(p.q, chunk.batch, chunk.begin, shared),
                   p.q.token_stride, p.keys, true);
      copy_rows<T>(writes, kTokens, chunk.count, row_at<T>(p.k, chunk.batch, chunk.begin, shared),
                   p.k.token_stride, p.keys, true);
    }
    if (p.v.data) {
      copy_rows<T>(v, kTokens, chunk.count, row_at<T>(p.v, chunk.batch, chunk.begin, head) + first,
                   p.v.token_stride, values, p.v_aligned);
    }
    constexpr int kSquare = kTokens * kTokens;
    copy_rows<T>(scores, kTokens, kTokens,
                 static_cast<const T*>(p.prepared.scores) + unit * kSquare, kTokens, kTokens, true);
    if (p.prepared.solve) {
      copy_rows<float>(solve, kTokens, kTokens, p.prepared.solve + unit * kSquare, kTokens, kTokens,
                       true);
    }
    copy_floats(factors, p.prepared.factors + unit * 4 * kTokens, 4 * kTokens);
    copy_floats(totals, p.prepared.totals + unit * p.key_row, p.key_row);
  }

 private:
  __device__ __forceinline__ static void copy_floats(float* to, const float* from, int count) {
    for (int i = 4 * threadIdx.x; i < count; i += 4 * blockDim.x) copy_async_16(to + i, from + i);
  }
};

// Rows of a tile as columns of sums: 16 columns of theirs from `first` on as rows.
template <class T, int kBlocks>
__device__ __forceinline__ void load_columns(T, Sums<1, kBlocks>& sums, const Tile& tile,
                                             int first) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int block = 0; block < kBlocks; block += 2) {
    uint32_t r[4];
    load_matrices_4_transposed(
        r, tile.chunk(8 * block + lane % 8 + lane / 16 * 8, first / 8 + lane / 8 % 2));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float* const c = sums.c[0][block + i / 2] + i % 2 * 2;
      c[0] = widen(T{static_cast<uint16_t>(r[i] & 0xffff)});
      c[1] = widen(T{static_cast<uint16_t>(r[i] >> 16)});
    }
  }
}
template <int kBlocks>
__device__ __forceinline__ void load_columns(float, Sums<1, kBlocks>& sums, const Tile& tile,
                                             int first) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      sums.c[0][block][e] =
          *tile.element<float>(8 * block + lane % 4 * 2 + e % 2, first + lane / 4 + e / 2 * 8);
    }
  }
}

// Multiplies columns by factors of theirs.
template <int kBlocks>
__device__ __forceinline__ void scale_columns(Sums<1, kBlocks>& sums, const float* factors) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
    for (int e = 0; e < 4; ++e) sums.c[0][block][e] *= factors[8 * block + lane % 4 * 2 + e % 2];
  }
}

// Solves X (I - L)^T = C in place, L as Prepared::solve has it. Number: float or Finite.
template <class Number, int kBlocks>
__device__ __forceinline__ void solve_columns(Sums<1, kBlocks>& x, const Tile& solve) {
#pragma unroll
  for (int block = 0; block < kBlocks; block += 2) {
    Sums<1, 2> c, solved;
#pragma unroll
    for (int e = 0; e < 8; ++e) c.c[0][e / 4][e % 4] = x.c[0][block + e / 4][e % 4];
    multiply_transposed<Number>(c, x, solve, block, 8 * block);
    solved.clear();
    multiply_transposed<Number>(solved, c, solve, 2, 8 * block, block);
#pragma unroll
    for (int e = 0; e < 8; ++e) x.c[0][block + e / 4][e % 4] = solved.c[0][e / 4][e % 4];
  }
}

// Likewise X (I - L) = C.
template <class Number, int kBlocks>
__device__ __forceinline__ void solve_columns_back(Sums<1, kBlocks>& x, const Tile& solve) {
#pragma unroll
  for (int block = kBlocks - 2; block >= 0; block -= 2) {
    Sums<1, 2> c, solved;
#pragma unroll
    for (int e = 0; e < 8; ++e) c.c[0][e / 4][e % 4] = x.c[0][block + e / 4][e % 4];
    multiply_columns<Number>(c, x, solve, 0, block, kBlocks * 8, block + 2);
    solved.clear();
    multiply_columns<Number>(solved, c, solve, 8 * block, block, kBlocks * 8);
#pragma unroll
    for (int e = 0; e < 8; ++e) x.c[0][block + e / 4][e % 4] = solved.c[0][e / 4][e % 4];
  }
}

template <int kBlocks>
__device__ __forceinline__ void add(Sums<1, kBlocks>& sums, const Sums<1, kBlocks>& x) {
#pragma unroll
  for (int e = 0; e < 4 * kBlocks; ++e) sums.c[0][e / 4][e % 4] += x.c[0][e / 4][e % 4];
}

// S^T of 16 columns of V, [K][V] in memory; zeros beyond.
template <int kBlocks>
__device__ __forceinline__ void load_state(Sums<1, kBlocks>& state, const float* from,
                                           int64_t key_stride, int keys, int values) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int key = 8 * block + lane % 4 * 2 + e % 2, value = lane / 4 + e / 2 * 8;
      const bool inside = from != nullptr && key < keys && value < values;
      state.c[0][block][e] = inside ? from[key * key_stride + value] : 0.f;
    }
  }
}

// Calls body(key, value, element) for those that exist.
template <int kBlocks, class Body>
__device__ __forceinline__ void for_state(Sums<1, kBlocks>& state, int keys, int values,
                                          const Body& body) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int key = 8 * block + lane % 4 * 2 + e % 2, value = lane / 4 + e / 2 * 8;
      if (key < keys && value < values) body(key, value, state.c[0][block][e]);
    }
  }
}

// A warp's walk over the chunks of a sequence and value head, for its columns of V.
template <class T, int kDim>
struct Walk {
  using Tiles = ChunkTiles<T, kDim>;
  static constexpr int kTokens = Tiles::kTokens, kDepth = 32 / sizeof(T);
  using Columns = Sums<1, kTokens / 8>;
  using Solved = std::conditional_t<sizeof(T) == sizeof(float), float, Finite>;

  const WalkParams& p;
  const ChunkParams& c;
  int head;
  int first, column;  // of V: the block's first one, and the warp's from there
  int values;         // columns of V from the warp's first on
  int steps;          // of products over K
  SegmentOf segment;
  int64_t first_number;  // of the sequence's chunks
  Sums<1, kDim / 8> state;

  __device__ __forceinline__ explicit Walk(const WalkParams& params) : p(params), c(params.c) {
    first = static_cast<int>(blockIdx.x % p.value_blocks) * (blockDim.x / 32) * kWarpValues;
    head = static_cast<int>(blockIdx.x / p.value_blocks % c.heads);
    column = threadIdx.x / 32 * kWarpValues;
    values = c.values - first - column;
    steps = (c.keys + kDepth - 1) / kDepth;
  }

  // Whether there is something to do.
  template <bool kBack>
  __device__ __forceinline__ bool begin() {
    const int64_t number = blockIdx.x / p.value_blocks / c.heads;
    if (!find_segment(c, p.segment, number, segment)) return false;
    const bool at_first = kBack ? segment.last : segment.first;
    if ((p.skip_first && segment.first) || (p.skip_last && segment.last)) return false;
    first_number = first_chunk<kTokens>(c, segment.sequence);
    const float* from = nullptr;
    int64_t stride = c.values;
    if (!p.partial && at_first && p.initial_state.data) {
      from = row_at<float>(p.initial_state, segment.sequence, 0, head) + first + column;
      stride = p.initial_state.token_stride;
    } else if (!p.partial && !at_first) {
      from = p.passed + state_offset(number + (kBack ? 1 : -1));
    }
    load_state(state, from, stride, c.keys, values);
    if (!p.identity) return true;
    for_state(state, c.keys, values,
              [&](int key, int value, float& x) { x = key == first + column + value ? 1.f : 0.f; });
    return true;
  }

  // Of [.., heads][K][V], at the warp's columns.
  __device__ __forceinline__ int64_t state_offset(int64_t i) const {
    return (i * c.heads + head) * c.keys * int64_t{c.values} + first + column;
  }

  __device__ __forceinline__ ChunkOf chunk_at(int64_t i) const {
    const int64_t begin = segment.span.begin + i * kTokens;
    const int64_t left = segment.span.end - begin;
    return {segment.sequence, segment.span.batch, begin, static_cast<int>(clamp(left, 0, kTokens))};
  }
  // Of the chunk and head, among all that was prepared.
  __device__ __forceinline__ int64_t unit_of(int64_t i) const {
    return (first_number + i) * c.heads + head;
  }

  // Calls step(i, tiles) for each chunk, from the first to the last or the other way round.
  template <bool kBack, class Step>
  __device__ __forceinline__ void run(const Step& step) const {
    const int warps = blockDim.x / 32, wide = warps * kWarpValues;
    const int block_values = c.values - first < wide ? c.values - first : wide;
    char* const memory = shared_memory();
    const int stage_bytes = Tiles(memory, c, warps).bytes;
    clear_memory(memory, p.stages * stage_bytes);
    __syncthreads();
    const auto tiles_of = [&](int64_t i) {
      return Tiles(memory + i % p.stages * stage_bytes, c, warps);
    };
    const int64_t begin = segment.begin / kTokens;
    const int64_t chunks = (segment.end - segment.begin + kTokens - 1) / kTokens;
    const auto number_of = [&](int64_t i) { return begin + (kBack ? chunks - 1 - i : i); };
    const auto start = [&](int64_t i) {
      if (i >= chunks) return;
      const int64_t number = number_of(i);
      tiles_of(i).start(c, first_number + number, chunk_at(number), head, first, block_values);
      commit_copies();
    };
    start(0);
    for (int64_t i = 0; i < chunks; ++i) {
      wait_copies<0>();
      __syncthreads();
      if (p.stages > 1) start(i + 1);
      step(number_of(i), tiles_of(i));
      if (p.stages > 1) continue;
      __syncthreads();
      start(i + 1);
    }
  }

  // Stores the state as an operand, [V][row] of a chunk; if wanted.
  __device__ __forceinline__ void keep_state(int64_t i) const {
    if (!p.states) return;
    const int lane = threadIdx.x % 32, key = lane % 4 * 2;
    T* const to = static_cast<T*>(p.states) + (unit_of(i) * c.values + first + column) * c.row;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int value = lane / 4 + 8 * half;
      if (value >= values) continue;
      T* const row = to + int64_t{value} * c.row + key;
#pragma unroll
      for (int block = 0; block < kDim / 8; ++block) {
        const float* const pair = state.c[0][block] + 2 * half;
        if (8 * block + key < c.row) store_pair(row + 8 * block, pair[0], pair[1]);
      }
    }
  }

  // Stores columns times factors of theirs, or as they are, as rows of [B, T, HV, V]; if wanted.
  // They take the place of the warp's columns of v.
  __device__ __forceinline__ void store_columns(const Columns& x, const Tile& v, void* data,
                                                int64_t i, const float* factors) const {
    if (!data) return;
    const int lane = threadIdx.x % 32;
    __syncwarp();
#pragma unroll
    for (int e = 0; e < kTokens / 2; ++e) {
      const int row = e / 4 * 8 + lane % 4 * 2 + e % 2, value = lane / 4 + e / 2 % 2 * 8;
      const float factor = factors ? factors[row] : 1.f;
      narrow(x.c[0][e / 4][e % 4] * factor, *v.element<T>(row, column + value));
    }
    __syncwarp();
    constexpr int kPart = 16 / sizeof(T), kParts = kWarpValues / kPart;  // of a row
    const ChunkOf chunk = chunk_at(i);
    const int64_t token = chunk.batch * c.sequences.tokens + chunk.begin;
    const int value = lane % kParts * kPart;
    const int64_t stride = int64_t{c.heads} * c.values;
    T* const to =
        static_cast<T*>(data) + (token * c.heads + head) * c.values + first + column + value;
    const bool whole = c.values % kPart == 0;
    if (value >= values) return;
    for (int row = lane / kParts; row < chunk.count; row += 32 / kParts) {
      const auto part =
          *reinterpret_cast<const Chunk<T, kPart>*>(v.chunk(row, (column + value) / kPart));
      T* const row_part = to + row * stride;
      if (whole) {
        *reinterpret_cast<Chunk<T, kPart>*>(row_part) = part;
      } else {
        for (int e = 0; e < kPart && value + e < values; ++e) row_part[e] = part.elements[e];
      }
    }
  }

  template <bool kBack>
  __device__ __forceinline__ void finish() {
    const int64_t number = blockIdx.x / p.value_blocks / c.heads;
    float* to = p.partial;
    if (to) {
      to += state_offset(number);
    } else if ((kBack ? segment.first : segment.last) && p.state) {
      to = p.state + state_offset(segment.sequence);
    } else {
      return;
    }
    for_state(state, c.keys, values,
              [&](int key, int value, float x) { to[int64_t{key} * c.values + value] = x; });
  }
};

template <class T, int kDim>
__global__ void __launch_bounds__(32 * kWalkWarps, 1) walk_chunks(const WalkParams p) {
  using W = Walk<T, kDim>;
  constexpr int kTokens = W::kTokens;
  W walk(p);
  if (!walk.template begin<false>()) return;
  walk.template run<false>([&](int64_t i, const typename W::Tiles& tiles) {
    walk.keep_state(i);
    typename W::Columns u;
    load_columns(T(), u, tiles.v, walk.column);
    if (p.c.prepared.solve) {
      typename W::Columns erased;
      erased.clear();
      multiply_transposed<T>(erased, walk.state, tiles.erases, walk.steps);
      scale_columns(erased, tiles.factors + kTokens);
      scale_columns(u, tiles.factors + 3 * kTokens);
      add(u, erased);
      solve_columns<typename W::Solved>(u, tiles.solve);
    }
    walk.store_columns(u, tiles.v, p.us, i, nullptr);
    if (p.out) {
      typename W::Columns out;
      out.clear();
      multiply_transposed<T>(out, walk.state, tiles.reads, walk.steps);
      scale_columns(out, tiles.factors);
      multiply_transposed<T, true>(out, u, tiles.scores, kTokens / W::kDepth);
      walk.store_columns(out, tiles.v, p.out, i,
                         p.inverse ? p.inverse + walk.unit_of(i) * kTokens : nullptr);
    }
    scale_columns(walk.state, tiles.totals);
    scale_columns(u, tiles.factors + 2 * kTokens);
    multiply_columns<T>(walk.state, u, tiles.writes, 0, 0, p.c.keys);
  });
  walk.template finish<false>();
}

// The walk back, of gradients: v is dout, and the state the gradient of S.
//   dU = scores^T dO + (k after) dS,  dR = (I - L)^-T dU (delta rule; else dU),  dV = beta dR
//   dS = total dS + (scale q before)^T dO - (beta k before)^T dR
template <class T, int kDim>
__global__ void __launch_bounds__(32 * kWalkWarps, 1) walk_back(const WalkParams p) {
  using W = Walk<T, kDim>;
  constexpr int kTokens = W::kTokens;
  const bool delta = p.c.prepared.solve != nullptr;
  W walk(p);
  if (!walk.template begin<true>()) return;
  walk.template run<true>([&](int64_t i, const typename W::Tiles& tiles) {
    walk.keep_state(i);
    typename W::Columns dout, du;
    load_columns(T(), dout, tiles.v, walk.column);
    if (p.inverse) scale_columns(dout, p.inverse + walk.unit_of(i) * kTokens);
    du.clear();
    multiply_transposed<T>(du, walk.state, tiles.writes, walk.steps);
    scale_columns(du, tiles.factors + 2 * kTokens);
    multiply_columns<T>(du, dout, tiles.scores, 0, 0, kTokens);
    if (delta) solve_columns_back<typename W::Solved>(du, tiles.solve);
    walk.store_columns(du, tiles.v, p.us, i, nullptr);
    walk.store_columns(du, tiles.v, p.out, i, delta ? tiles.factors + 3 * kTokens : nullptr);
    scale_columns(walk.state, tiles.totals);
    scale_columns(dout, tiles.factors);
    multiply_columns<T>(walk.state, dout, tiles.reads, 0, 0, p.c.keys);
    if (!delta) return;
    scale_columns(du, tiles.factors + kTokens);
    multiply_columns<T>(walk.state, du, tiles.erases, 0, 0, p.c.keys);
  });
  walk.template finish<true>();
}

}  // namespace memkernels::scan::cuda
