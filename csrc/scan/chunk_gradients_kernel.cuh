// The gradients of q, k, beta and g from those of what the walks have left; names as in
// chunk_scan_backward_cpu.cpp. A chunk by itself:
//   dscores = dO U^T,  dsolve = dR U^T,  dread = dO S^T,  derase = dR S^T,  dwrite = U dS^T
// are sums over V, a slice of its columns at a time. Then, with one decay a token,
//   dq = (mask dscores) k + before dread
//   dk = (mask dscores)^T q + (mask dsolve) k + (mask dsolve)^T k + before derase + after dwrite
// and a dg is a sum of products that the decay is a factor of, times their gradients.
//
// A block a chunk and value head; all five sums stay in registers, a warp's 32 columns of K at a
// time. Cost: 4 K V + 2 C V + 6 C K flops a token and head, the delta rule 2 K V + 2 C V + 6 C K
// more. In 16 bits S and dS are 4 K V / C bytes a token, and rows of its own 4 V + 8 K, with the
// delta rule 8 V + 8 K: some 60 flops a byte, which is bound by memory.
#pragma once

#include "core/cuda/chunk.cuh"
#include "core/cuda/slices.cuh"
#include "scan/chunk_prepare_kernel.cuh"

namespace memkernels::scan::cuda {

template <class T, int kDim>
struct GradientShape {
  static constexpr int kTokens = chunk_tokens(sizeof(T), kDim);
  static constexpr int kThreads = 256, kWarps = kThreads / 32;
  static constexpr int kDepth = 32 / sizeof(T);            // of a step of a product
  static constexpr int kSlice = kSliceBytes / sizeof(T);   // columns of V
  static constexpr int kKeys = 32, kParts = kDim / kKeys;  // columns of K a warp has
  static constexpr int kTiles = kTokens / 16 * kParts / kWarps;
  static constexpr int kPairBlocks = kTokens == 64 ? 4 : 1;
  static constexpr int kPairParts = kTokens / (8 * kPairBlocks);
  static constexpr int kKeyPitch = kDim * sizeof(T);
  static constexpr int kPitch = PrepareShape<kTokens>::kPitch;
  static constexpr int kPairPitch = pitch_of(kTokens * sizeof(T));
  static constexpr int kSquareBytes = kTokens * (4 * kPitch + 2 * kPairPitch);
  static constexpr int kNumbers = kTokens * (9 + kPairParts + 3 * kParts) + kDim;
  static_assert(kTiles * 16 * kKeys * kWarps == kTokens * kDim);
  static_assert(kTokens / 16 * kPairParts <= kWarps);
};

// Of a block's shared memory: numbers, then stages of slices, then what follows from their sums.
template <class T, int kDim>
struct GradientMemory {
  using Shape = GradientShape<T, kDim>;
  static constexpr int kTokens = Shape::kTokens;

  // [kTokens], but for
  float *gate, *beta, *inverse, *dnormalizer;
  float *before, *after;
  float *q_norm, *k_norm;          // only those that are wanted
  float* of_values;                // sum_v dR v
  float *reads, *erases, *writes;  // [kParts][kTokens] sums over columns of products with dread,
  float* erased;                   // [kPairParts][kTokens] and of dsolve keys
  float* dtotal;                   // [K] total times its gradient
  char *stages, *end;
  int stage_bytes, bytes;

  __host__ __device__ __forceinline__ GradientMemory(char* memory, const ChunkGradParams& p) {
    float* next = reinterpret_cast<float*>(memory);
    const auto take = [&](int rows) {
      float* const data = next;
      next += rows * kTokens;
      return data;
    };
    gate = take(1), beta = take(1), inverse = take(1), dnormalizer = take(1);
    before = take(1), after = take(1);
    q_norm = take(1), k_norm = take(1);
    of_values = take(1);
    reads = take(Shape::kParts), erases = take(Shape::kParts), writes = take(Shape::kParts);
    erased = take(Shape::kPairParts);
    dtotal = next;
    constexpr int kNumberBytes = pitch_of(sizeof(float) * Shape::kNumbers);
    stages = memory + kNumberBytes;
    const bool delta = p.c.beta.rows.data != nullptr;
    stage_bytes = (2 + delta + (p.dbeta != nullptr)) * kTokens * kSliceBytes +
                  2 * Shape::kSlice * Shape::kKeyPitch;
    const auto most = [](int a, int b) { return a > b ? a : b; };
    const int final_bytes =
        2 * kTokens * Shape::kKeyPitch + most(Shape::kSquareBytes, p.channel_bytes);
    end = stages + most(p.stages * stage_bytes, final_bytes);
    bytes = static_cast<int>(end - memory);
  }

  // Tiles of a slice, of those of dR and V that there are.
  struct Slice {
    Tile dout, u, du, v, state, dstate;
  };
  __device__ __forceinline__ Slice slice(const ChunkGradParams& p, int i) const {
    char* next = stages + i % p.stages * stage_bytes;
    const auto take = [&](int rows, int pitch) {
      char* const data = next;
      next += rows * pitch;
      return Tile{data, pitch};
    };
    Slice s;
    s.state = take(Shape::kSlice, Shape::kKeyPitch);
    s.dstate = take(Shape::kSlice, Shape::kKeyPitch);
    s.dout = take(kTokens, kSliceBytes);
    s.u = take(kTokens, kSliceBytes);
    s.du = take(kTokens, kSliceBytes);
    s.v = take(kTokens, kSliceBytes);
    return s;
  }

  // After `slices` of them q and k lie where the last one does not, and beside them what follows
  // from the sums.
  __device__ __forceinline__ Tile query_rows(const ChunkGradParams& p, int slices) const {
    return {slices % p.stages == 0 ? stages : end - 2 * kTokens * Shape::kKeyPitch,
            Shape::kKeyPitch};
  }
  __device__ __forceinline__ Tile key_rows(const ChunkGradParams& p, int slices) const {
    return {query_rows(p, slices).data + kTokens * Shape::kKeyPitch, Shape::kKeyPitch};
  }
  __device__ __forceinline__ char* rest(const ChunkGradParams& p, int slices) const {
    return stages + (slices % p.stages == 0 ? 2 * kTokens * Shape::kKeyPitch : 0);
  }
  // [kTokens][kPitch]: the mask, then products of pairs times their gradients.
  __device__ __forceinline__ float* pairs(const ChunkGradParams& p, int slices) const {
    return reinterpret_cast<float*>(rest(p, slices));
  }
};

// The five sums; of pairs a warp has 16 rows, at kPairBlocks times 8 columns, of the others kTiles
// times 16 rows, at kKeys columns.
template <class T, int kDim>
struct ChunkSums {
  using Shape = GradientShape<T, kDim>;
  static constexpr int kBlocks = Shape::kKeys / 8;

  Sums<1, Shape::kPairBlocks> dscores, dsolve;
  Sums<Shape::kTiles, kBlocks> dread, derase, dwrite;

  // Where a warp's lie.
  struct Place {
    int pair_row, pair_column, row, key;
  };
  __device__ __forceinline__ static Place place() {
    const int warp = threadIdx.x / 32;
    return {warp / Shape::kPairParts * 16, warp % Shape::kPairParts * 8 * Shape::kPairBlocks,
            warp / Shape::kParts * 16 * Shape::kTiles, warp % Shape::kParts * Shape::kKeys};
  }
};

// Starts copying rows, zeros for those from `count` on and past their `dim` elements.
template <class T>
__device__ __forceinline__ void copy_padded(const Tile& tile, int rows, int count, const T* first,
                                            int64_t stride, int dim, bool aligned) {
  constexpr int kLanes = kSliceBytes / 16, kSlice = kSliceBytes / sizeof(T);
  for (int i = threadIdx.x / kLanes; i < rows; i += blockDim.x / kLanes) {
    const T* const row = first + (i < count ? i : 0) * stride;
    for (int c = 0; c * kSliceBytes < tile.pitch; ++c) {
      copy_slice<T>(Tile{tile.data + c * kSliceBytes, tile.pitch}, i, row + c * kSlice,
                    dim - c * kSlice, aligned, i < count);
    }
  }
}

// sums += L B: L rows [row, row + 16 kTiles) of a tile, or the same of its transpose; B another's
// columns from `column` on; over steps [begin, end).
template <class T, bool kTransposed, int kTiles, int kBlocks>
__device__ __forceinline__ void multiply_tiles(Sums<kTiles, kBlocks>& sums, const Tile& left,
                                               int row, const Tile& b, int column, int begin,
                                               int end) {
  constexpr int kDepth = 32 / sizeof(T);
  for (int step = begin; step < end; ++step) {
    uint32_t a[kTiles][4];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      if constexpr (kTransposed) {
        load_left_transposed(T(), a[tile], left, step * kDepth, row + 16 * tile);
      } else {
        load_left(T(), a[tile], left, row + 16 * tile, step);
      }
    }
#pragma unroll
    for (int block = 0; block < kBlocks; block += 2) {
      uint32_t right[2][2];
      load_two_blocks(T(), right, b, step * kDepth, column / 8 + block);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        multiply_add(T(), sums.c[tile][block], a[tile], right[0]);
        multiply_add(T(), sums.c[tile][block + 1], a[tile], right[1]);
      }
    }
  }
}

// Sums over V; and q and k as tiles, dtotal of S in memory.dtotal, and of_values.
template <class T, int kDim>
__device__ __forceinline__ void sum_over_values(ChunkSums<T, kDim>& sums,
                                                const GradientMemory<T, kDim>& memory,
                                                const ChunkGradParams& p, const ChunkOf& chunk,
                                                int head, int slices) {
  using Shape = GradientShape<T, kDim>;
  constexpr int kTokens = Shape::kTokens, kSlice = Shape::kSlice;
  constexpr int kElements = 16 / sizeof(T), kColumns = kDim / kElements;  // chunks of a row of S
  constexpr int kGroups = Shape::kThreads / kColumns;
  constexpr int kLanes = kSliceBytes / 16, kRows = (kTokens * kLanes - 1) / Shape::kThreads + 1;
  const ChunkParams& c = p.c;
  const bool delta = c.beta.rows.data != nullptr;
  const int tid = threadIdx.x;
  const int64_t token = chunk.batch * c.sequences.tokens + chunk.begin, unit = blockIdx.x;
  const int64_t values_at = (token * c.heads + head) * c.values;
  const int64_t stride = int64_t{c.heads} * c.values, states_at = unit * c.values * c.row;

  const auto start = [&](int i) {
    if (i < slices) {
      const auto tiles = memory.slice(p, i);
      const int first = i * kSlice, left = c.values - first;
      const auto copy = [&](const Tile& tile, const void* x) {
        copy_padded(tile, kTokens, chunk.count, static_cast<const T*>(x) + values_at + first,
                    stride, left, p.aligned);
      };
      copy(tiles.dout, p.dout);
      copy(tiles.u, p.us);
      if (delta) copy(tiles.du, p.dus);
      if (p.dbeta) {
        copy_padded(tiles.v, kTokens, chunk.count,
                    row_at<T>(c.v, chunk.batch, chunk.begin, head) + first, c.v.token_stride, left,
                    c.v_aligned);
      }
      const int64_t at = states_at + int64_t{first} * c.row;
      copy_padded(tiles.state, kSlice, left, static_cast<const T*>(p.states) + at, c.row, c.row,
                  true);
      copy_padded(tiles.dstate, kSlice, left, static_cast<const T*>(p.dstates) + at, c.row, c.row,
                  true);
    } else {
      const int shared = head / c.group;
      copy_padded(memory.query_rows(p, slices), kTokens, chunk.count,
                  row_at<T>(c.q, chunk.batch, chunk.begin, shared), c.q.token_stride, c.keys,
                  c.qk_aligned);
      copy_padded(memory.key_rows(p, slices), kTokens, chunk.count,
                  row_at<T>(c.k, chunk.batch, chunk.begin, shared), c.k.token_stride, c.keys,
                  c.qk_aligned);
    }
    commit_copies();
  };

  const auto place = ChunkSums<T, kDim>::place();
  const bool in_pairs = place.pair_row < kTokens &&
                        place.pair_column < place.pair_row + 16;  // not above the diagonal
  const bool in_keys = place.key < c.keys;
  sums.dscores.clear(), sums.dsolve.clear();
  sums.dread.clear(), sums.derase.clear(), sums.dwrite.clear();
  const int column = tid % kColumns;
  const bool in_state = p.dg && column * kElements < c.keys;
  float of_states[kElements] = {}, of_values[kRows] = {};
  if (p.stages > 1) start(0);
  for (int i = 0; i < slices; ++i) {
    start(i + p.stages - 1);
    p.stages > 1 ? wait_copies<1>() : wait_copies<0>();
    __syncthreads();
    const auto tiles = memory.slice(p, i);
    const int left = c.values - i * kSlice;
    const int steps = ((left < kSlice ? left : kSlice) + Shape::kDepth - 1) / Shape::kDepth;
    if (in_pairs) {
      multiply_rows<T>(sums.dscores, tiles.dout, place.pair_row, tiles.u, place.pair_column, steps);
      if (delta) {
        multiply_rows<T>(sums.dsolve, tiles.du, place.pair_row, tiles.u, place.pair_column, steps);
      }
    }
    if (in_keys) {
      multiply_tiles<T, false>(sums.dread, tiles.dout, place.row, tiles.state, place.key, 0, steps);
      if (delta) {
        multiply_tiles<T, false>(sums.derase, tiles.du, place.row, tiles.state, place.key, 0,
                                 steps);
      }
      multiply_tiles<T, false>(sums.dwrite, tiles.u, place.row, tiles.dstate, place.key, 0, steps);
    }
    for (int row = tid / kColumns; in_state && row < kSlice; row += kGroups) {
      float x[kElements], y[kElements];
      load(tiles.state.template element<T>(row, column * kElements), x);
      load(tiles.dstate.template element<T>(row, column * kElements), y);
#pragma unroll
      for (int e = 0; e < kElements; ++e) of_states[e] += x[e] * y[e];
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int row = tid / kLanes + r * (Shape::kThreads / kLanes);
      if (!p.dbeta || row >= kTokens) break;
      float x[kElements], y[kElements];
      load(tiles.du.template element<T>(row, tid % kLanes * kElements), x);
      load(tiles.v.template element<T>(row, tid % kLanes * kElements), y);
#pragma unroll
      for (int e = 0; e < kElements; ++e) of_values[r] += x[e] * y[e];
    }
    __syncthreads();
  }
  if (p.stages == 1) start(slices);
  // Between the products of S and dS of several rows.
  float* const partial = memory.pairs(p, slices) + kTokens * Shape::kPitch;
  static_assert(sizeof(float) * kGroups * kDim <= 2 * kTokens * Shape::kPairPitch);
  for (int e = 0; in_state && e < kElements; ++e) {
    partial[tid / kColumns * kDim + column * kElements + e] = of_states[e];
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
      of_values[r] += __shfl_xor_sync(kWholeWarp, of_values[r], lanes);
    }
    const int row = tid / kLanes + r * (Shape::kThreads / kLanes);
    if (row < kTokens && tid % kLanes == 0) memory.of_values[row] = of_values[r];
  }
  wait_copies<0>();
  __syncthreads();
  if (!p.dg || tid >= c.keys) return;
  float product = 0.f;
  for (int group = 0; group < kGroups; ++group) product += partial[group * kDim + tid];
  const int64_t at = unit * c.key_row + tid;
  if (p.dnormalizers) product += p.zs[at] * p.dzs[at];
  memory.dtotal[tid] = product * c.prepared.totals[at];
}

// Sums over the four lanes that share rows, to where their warp's column part of them is.
template <int kRows>
__device__ __forceinline__ void store_row_sums(float (&sums)[kRows], float* to, int row) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    sums[i] += __shfl_xor_sync(kWholeWarp, sums[i], 1);
    sums[i] += __shfl_xor_sync(kWholeWarp, sums[i], 2);
    if (lane % 4 == 0) to[row + lane / 4 + 8 * i] = sums[i];
  }
}

// Writes a warp's columns of the gradients of rows, x where those have been normalised: less what
// is along them then.
template <class T, int kDim, class Gradients>
__device__ __forceinline__ void write_gradients(const ChunkGradParams& p, void* to, int64_t token,
                                                int count, int head, const Gradients& gradients,
                                                const Tile& x, const float* norms,
                                                const float* along) {
  using Shape = GradientShape<T, kDim>;
  const auto place = ChunkSums<T, kDim>::place();
  const int lane = threadIdx.x % 32, keys = p.c.keys, parts = (keys - 1) / Shape::kKeys + 1;
  if (!to || place.key >= keys) return;
#pragma unroll
  for (int half = 0; half < 2 * Shape::kTiles; ++half) {
    const int i = place.row + lane / 4 + 8 * half;
    if (i >= count) continue;
    float c[Shape::kKeys / 8][4];
    float projection = 0.f;
    for (int part = 0; p.c.qk_l2norm && part < parts; ++part) {
      projection += along[part * Shape::kTokens + i];
    }
    const float factor = p.c.qk_l2norm ? norms[i] : 1.f;
#pragma unroll
    for (int block = 0; block < Shape::kKeys / 8; ++block) {
      float pair[2] = {};
      if (p.c.qk_l2norm) {
        load(x.template element<T>(i, place.key + 8 * block + lane % 4 * 2), pair);
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int at = half % 2 * 2 + e;
        c[block][at] = gradients.c[half / 2][block][at];
        if (p.c.qk_l2norm) c[block][at] -= projection * pair[e];
      }
    }
    const int64_t row = ((token + i) * p.c.heads + head) * keys;
    if (p.dqk_is_float) {
      store_row(static_cast<float*>(to) + row, c, half % 2, factor, place.key, keys);
    } else {
      store_row(static_cast<T*>(to) + row, c, half % 2, factor, place.key, keys);
    }
  }
}

// From the sums to the gradients, with one decay a token.
template <class T, int kDim>
__device__ __forceinline__ void through_token_decays(ChunkSums<T, kDim>& sums,
                                                     const GradientMemory<T, kDim>& memory,
                                                     const ChunkGradParams& p, const ChunkOf& chunk,
                                                     int head, int slices) {
  using Shape = GradientShape<T, kDim>;
  constexpr int kTokens = Shape::kTokens, kPitch = Shape::kPitch;
  constexpr int kBlocks = Shape::kKeys / 8, kRows = 2 * Shape::kTiles;
  const ChunkParams& c = p.c;
  const bool delta = c.beta.rows.data != nullptr;
  const int tid = threadIdx.x, lane = tid % 32;
  const int64_t token = chunk.batch * c.sequences.tokens + chunk.begin, unit = blockIdx.x;
  const auto place = ChunkSums<T, kDim>::place();
  const int part = place.key / Shape::kKeys, parts = (c.keys - 1) / Shape::kKeys + 1;
  const Tile q = memory.query_rows(p, slices), k = memory.key_rows(p, slices);
  float* const pairs = memory.pairs(p, slices);
  const Tile dscores{reinterpret_cast<char*>(pairs + kTokens * kPitch), Shape::kPairPitch};
  const Tile dsolve{dscores.data + kTokens * Shape::kPairPitch, Shape::kPairPitch};

  if (c.qk_l2norm) {
    normalize_rows<T, kTokens>(memory.q_norm, q, c.keys);
    normalize_rows<T, kTokens>(memory.k_norm, k, c.keys);
  }
  find_mask<kTokens>(pairs, memory.gate);
  if (tid < kTokens) {
    float before = 1.f, after = 1.f;
    for (int i = 0; i < kTokens; ++i) (i <= tid ? before : after) *= memory.gate[i];
    memory.before[tid] = before;
    memory.after[tid] = after;
  }
  __syncthreads();

  if (place.pair_row < kTokens) {
    const int steps = (c.keys + Shape::kDepth - 1) / Shape::kDepth;
    Sums<1, Shape::kPairBlocks> scores, keys;
    scores.clear();
    keys.clear();
    if (place.pair_column < place.pair_row + 16) {
      multiply_rows<T>(scores, q, place.pair_row, k, place.pair_column, steps);
      if (delta) multiply_rows<T>(keys, k, place.pair_row, k, place.pair_column, steps);
    }
    float erased[2] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = place.pair_row + lane / 4 + 8 * half;
      const float inverse = memory.inverse[i], dnormalizer = memory.dnormalizer[i];
      const float beta = memory.beta[i];
#pragma unroll
      for (int block = 0; block < Shape::kPairBlocks; ++block) {
        const int first = place.pair_column + 8 * block + lane % 4 * 2;
        float of_scores[2], of_solve[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int j = first + e, at = 2 * half + e;
          const bool lower = j < i;
          float* const pair = pairs + i * kPitch + j;
          const float m = j <= i ? *pair : 0.f, factor = m * c.scale;
          const float gradient = sums.dscores.c[0][block][at] * inverse + dnormalizer;
          const float of_key = sums.dsolve.c[0][block][at], key = keys.c[0][block][at] * m;
          of_scores[e] = j <= i ? gradient * factor : 0.f;
          of_solve[e] = lower ? -of_key * (beta * m) : 0.f;
          if (!lower) continue;
          erased[half] += of_key * key;
          *pair = gradient * (scores.c[0][block][at] * factor) - of_key * (beta * key);
        }
        store_pair(dscores.element<T>(i, first), of_scores[0], of_scores[1]);
        if (delta) store_pair(dsolve.element<T>(i, first), of_solve[0], of_solve[1]);
      }
    }
    store_row_sums(erased, memory.erased + place.pair_column / (8 * Shape::kPairBlocks) * kTokens,
                   place.pair_row);
  }

  // Where q and k meet the state; dread becomes dq, dwrite dk.
  if (place.key < c.keys) {
    float reads[kRows] = {}, erases[kRows] = {}, writes[kRows] = {};
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const int column = place.key + 8 * block + lane % 4 * 2;
      float z[2] = {}, dz[2] = {};
      for (int e = 0; p.dnormalizers && e < 2; ++e) {
        if (column + e >= c.keys) break;
        z[e] = p.zs[unit * c.key_row + column + e];
        dz[e] = p.dzs[unit * c.key_row + column + e];
      }
#pragma unroll
      for (int half = 0; half < kRows; ++half) {
        const int i = place.row + lane / 4 + 8 * half;
        const float inverse = memory.inverse[i], dnormalizer = memory.dnormalizer[i];
        const float before = memory.before[i], after = memory.after[i];
        const float erase = memory.beta[i] * before;
        float x[2], y[2];
        load(q.element<T>(i, column), x);
        load(k.element<T>(i, column), y);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int at = half % 2 * 2 + e;
          float& dread = sums.dread.c[half / 2][block][at];
          float& dwrite = sums.dwrite.c[half / 2][block][at];
          const float derase = sums.derase.c[half / 2][block][at];
          dread = dread * inverse + z[e] * dnormalizer;
          dwrite += dz[e];
          reads[half] += dread * x[e];
          erases[half] += derase * y[e];
          writes[half] += dwrite * y[e];
          dread *= c.scale * before;
          dwrite = dwrite * after - derase * erase;
        }
      }
    }
    store_row_sums(reads, memory.reads + part * kTokens, place.row);
    store_row_sums(erases, memory.erases + part * kTokens, place.row);
    store_row_sums(writes, memory.writes + part * kTokens, place.row);
  }
  __syncthreads();

  auto &dq = sums.dread, &dk = sums.dwrite;
  if (place.key < c.keys) {
    constexpr int kDepth = Shape::kDepth;
    const int from = place.row / kDepth, to = (place.row + 16 * Shape::kTiles) / kDepth;
    multiply_tiles<T, false>(dq, dscores, place.row, k, place.key, 0, to);
    multiply_tiles<T, true>(dk, dscores, place.row, q, place.key, from, kTokens / kDepth);
    if (delta) {
      multiply_tiles<T, false>(dk, dsolve, place.row, k, place.key, 0, to);
      multiply_tiles<T, true>(dk, dsolve, place.row, k, place.key, from, kTokens / kDepth);
    }
  }
  if (tid < kTokens) {
    float read = 0.f, erase = 0.f, write = 0.f, erased = 0.f;
    for (int i = 0; i < parts; ++i) {
      read += memory.reads[i * kTokens + tid];
      erase += memory.erases[i * kTokens + tid];
      write += memory.writes[i * kTokens + tid];
    }
    for (int i = 0; i < Shape::kPairParts; ++i) erased += memory.erased[i * kTokens + tid];
    erase *= memory.before[tid];
    if (p.dbeta && tid < chunk.count) {
      p.dbeta[(token + tid) * c.heads + head] = memory.of_values[tid] - erased - erase;
    }
    // What earlier decays are factors of, and later ones.
    memory.before[tid] = read * (c.scale * memory.before[tid]) - memory.beta[tid] * erase;
    memory.after[tid] *= write;
    // With the same of later tokens.
    float later = 0.f;
    for (int i = chunk.count - 1; p.dg && i > tid; --i) {
      later += pairs[i * kPitch + tid];
      pairs[i * kPitch + tid] = later;
    }
  }
  __syncthreads();
  for (int i = tid / 32; p.dg && i < chunk.count; i += Shape::kWarps) {
    float sum = 0.f;
    for (int j = lane; j < chunk.count; j += 32) {
      sum += j >= i ? memory.before[j] : memory.after[j] + pairs[i * kPitch + j];
    }
    for (int key = lane; key < c.keys; key += 32) sum += memory.dtotal[key];
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kWholeWarp, sum, lanes);
    if (lane == 0) p.dg[(token + i) * c.heads + head] = sum;
  }
  if (c.qk_l2norm) {
    if (place.key < c.keys) {
      float along_q[kRows] = {}, along_k[kRows] = {};
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
        for (int half = 0; half < kRows; ++half) {
          const int i = place.row + lane / 4 + 8 * half;
          const int column = place.key + 8 * block + lane % 4 * 2;
          float x[2], y[2];
          load(q.element<T>(i, column), x);
          load(k.element<T>(i, column), y);
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            along_q[half] += x[e] * dq.c[half / 2][block][half % 2 * 2 + e];
            along_k[half] += y[e] * dk.c[half / 2][block][half % 2 * 2 + e];
          }
        }
      }
      store_row_sums(along_q, memory.reads + part * kTokens, place.row);
      store_row_sums(along_k, memory.writes + part * kTokens, place.row);
    }
    __syncthreads();
  }
  write_gradients<T, kDim>(p, p.dq, token, chunk.count, head, dq, q, memory.q_norm, memory.reads);
  write_gradients<T, kDim>(p, p.dk, token, chunk.count, head, dk, k, memory.k_norm, memory.writes);
}

template <class T, int kDim>
__device__ __forceinline__ void through_channel_decays(ChunkSums<T, kDim>& sums,
                                                       const GradientMemory<T, kDim>& memory,
                                                       const ChunkGradParams& p,
                                                       const ChunkOf& chunk, int head, int slices);

template <class T, int kDim, bool kChannels>
__global__ void __launch_bounds__(GradientShape<T, kDim>::kThreads, 1)
    find_chunk_gradients(const ChunkGradParams p) {
  using Shape = GradientShape<T, kDim>;
  constexpr int kTokens = Shape::kTokens;
  const ChunkParams& c = p.c;
  ChunkOf chunk;
  if (!find_chunk<kTokens>(c, blockIdx.x / c.heads, chunk)) return;
  const int head = static_cast<int>(blockIdx.x % c.heads), tid = threadIdx.x;
  const int slices = (c.values + Shape::kSlice - 1) / Shape::kSlice;
  const int64_t unit = blockIdx.x;
  const GradientMemory<T, kDim> memory(shared_memory(), p);

  if constexpr (!kChannels) read_gates<T, kTokens>(memory.gate, c, chunk, head);
  if (tid < kTokens) {
    memory.beta[tid] = c.prepared.factors[(unit * 4 + 3) * kTokens + tid];
    const bool divided = p.dnormalizers && tid < chunk.count;
    memory.inverse[tid] = divided ? p.inverse[unit * kTokens + tid] : 1.f;
    memory.dnormalizer[tid] = divided ? p.dnormalizers[unit * kTokens + tid] : 0.f;
  }
  ChunkSums<T, kDim> sums;
  sum_over_values(sums, memory, p, chunk, head, slices);
  if constexpr (kChannels) {
    through_channel_decays(sums, memory, p, chunk, head, slices);
  } else {
    through_token_decays(sums, memory, p, chunk, head, slices);
  }
}

// Launches the kernel with its memory, in which p.channel_bytes are set.
template <class T, int kDim, bool kChannels>
void launch_gradients(const char* op, ChunkGradParams& p, const Context& ctx) {
  const auto bytes = [&](int stages) {
    p.stages = stages;
    return GradientMemory<T, kDim>(nullptr, p).bytes;
  };
  const int64_t shared = bytes(2) <= limits_of(op, ctx.device).of_block ? bytes(2) : bytes(1);
  launch(op, ctx, find_chunk_gradients<T, kDim, kChannels>, p.c.num_chunks * p.c.heads,
         GradientShape<T, kDim>::kThreads, shared, p);
}

}  // namespace memkernels::scan::cuda
