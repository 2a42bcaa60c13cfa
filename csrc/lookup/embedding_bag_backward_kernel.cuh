// grads[row] = sum over the row's entries of factor * grad[bag], in the order of the entries.
//
// Entries are sorted by row; equal ones keep their order. A row's entries are cut, from its first
// one on, into pieces of 64, which a warp adds up, and longer rows into trees of 32 such sums, then
// of 32 sums of these: so a row that every bag reads is the work of many warps, nothing is
// added atomically, and a sum depends on its own entries alone. A warp has the pieces that begin
// in 64 sorted places, which are at most 64 and lie side by side.
//
// Cost: for each entry D elements of grad, for each row D of the result (for listed rows D floats
// an entry, zeros included), and 1/8 byte an element for the sums of long rows. Sorting moves some
// 100 bytes an entry. From D = 256 on bound by memory (4.8 TB/s of an H200).
#pragma once

#include "core/cuda/chunk.cuh"
#include "lookup/embedding_bag_backward_cuda.h"

namespace memkernels::lookup::cuda {

// Blocks: 256 entries.
static __global__ void __launch_bounds__(256) key_entries(const BagGradParams p) {
  const int64_t place = int64_t{blockIdx.x} * 256 + threadIdx.x;
  if (place >= p.n) return;
  const int i = static_cast<int>(place);
  const int64_t row =
      integer_at(p.input, i / p.width * p.input_row_stride + i % p.width * p.input.stride);
  bool used = row >= 0 && row < p.num_rows;
  if (p.offsets.data) {
    int64_t begin = 0, end = p.num_bags;  // the first bag that begins behind i
    while (begin < end) {
      const int64_t middle = begin + (end - begin) / 2;
      if (at(p.offsets, middle) <= i) {
        begin = middle + 1;
      } else {
        end = middle;
      }
    }
    used = used && begin > 0;
    p.bags[i] = static_cast<int>(begin - 1);
  }
  p.keys[i] = static_cast<uint32_t>(used ? row : p.num_rows);
  p.entries[i] = i;
}

__device__ __forceinline__ bool is_used(const BagGradParams& p, int64_t place) {
  return place < p.n && p.keys[place] < p.num_rows;
}
// Whether a row begins there, or the used entries have ended.
__device__ __forceinline__ bool is_boundary(const BagGradParams& p, int64_t place) {
  return !is_used(p, place) || place == 0 || p.keys[place - 1] != p.keys[place];
}

// Blocks: those of add_pieces.
static __global__ void __launch_bounds__(kPositions) count_heads(const BagGradParams p) {
  int* const counts = reinterpret_cast<int*>(shared_memory());
  const int64_t place = int64_t{blockIdx.x} * kPositions + threadIdx.x;
  const bool head = is_used(p, place) && is_boundary(p, place);
  const int count = __popc(__ballot_sync(kWholeWarp, head));
  if (threadIdx.x % 32 == 0) counts[threadIdx.x / 32] = count;
  __syncthreads();
  if (threadIdx.x > 0) return;
  int all = 0;
  for (int warp = 0; warp < kPositions / 32; ++warp) all += counts[warp];
  p.ranks[blockIdx.x] = all;
}

// Of n counts, the sum of those before each, and of all. One block.
static __global__ void __launch_bounds__(kScanThreads, 1)
    scan_counts(int* counts, int64_t n, int64_t* total) {
  int* const warp_sums = reinterpret_cast<int*>(shared_memory());
  const int tid = threadIdx.x, lane = tid % 32;
  int before = 0;
  for (int64_t first = 0; first < n; first += kScanThreads) {
    const int64_t i = first + tid;
    const int mine = i < n ? counts[i] : 0;
    int sum = mine;
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const int other = __shfl_up_sync(kWholeWarp, sum, lanes);
      if (lane >= lanes) sum += other;
    }
    if (lane == 31) warp_sums[tid / 32] = sum;
    __syncthreads();
    int all = 0;
    for (int warp = 0; warp < kScanThreads / 32; ++warp) {
      if (warp == tid / 32) sum += all;
      all += warp_sums[warp];
    }
    if (i < n) counts[i] = before + sum - mine;
    before += all;
    __syncthreads();
  }
  if (tid == 0) *total = before;
}

// How many entries in front of `place` are of the same row. By a whole warp.
__device__ __forceinline__ int64_t entries_before(const BagGradParams& p, int64_t place) {
  const uint32_t key = p.keys[place];
  // At least `found`, at most `open` more; most rows are short.
  int64_t found = 0, open = place;
  for (int64_t step = 1; open > 0; step = open / 32 + 1) {
    const int64_t probe = found + (threadIdx.x % 32 + 1) * step;
    const bool same = probe <= found + open && p.keys[place - probe] == key;
    const int count = __popc(__ballot_sync(kWholeWarp, same));
    found += count * step;
    open -= count * step;
    if (count < 32 && open > step - 1) open = step - 1;
  }
  return found;
}

__device__ __forceinline__ int count_bits(uint64_t x) {
  return __popc(static_cast<uint32_t>(x)) + __popc(static_cast<uint32_t>(x >> 32));
}
// The place of the lowest bit that is set, 64 if there is none.
__device__ __forceinline__ int lowest_bit(uint64_t x) { return count_bits((x & (0 - x)) - 1); }
__device__ __forceinline__ int highest_bit(uint64_t x) {
#pragma unroll
  for (int shift = 1; shift < 64; shift *= 2) x |= x >> shift;
  return count_bits(x) - 1;
}
__device__ __forceinline__ uint64_t ballot_64(bool low, bool high) {
  return __ballot_sync(kWholeWarp, low) | uint64_t{__ballot_sync(kWholeWarp, high)} << 32;
}

// A thread's columns of a row.
template <int V>
struct Columns {
  static constexpr int kChunks = kLaneColumns / V;
  int first, dim;

  __device__ __forceinline__ Columns(const BagGradParams& p, int tile)
      : first(tile * kTileColumns + static_cast<int>(threadIdx.x) % 32 * V), dim(p.dim) {}
  __device__ __forceinline__ int at(int chunk) const { return first + chunk * 32 * V; }
  __device__ __forceinline__ bool has(int chunk) const { return at(chunk) < dim; }

  template <class T>
  __device__ __forceinline__ void load_chunks(const T* row, Chunk<T, V> (&x)[kChunks]) const {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      x[c] = {};
      if (has(c)) x[c] = *reinterpret_cast<const Chunk<T, V>*>(row + at(c));
    }
  }
  template <class T>
  __device__ __forceinline__ void store_sums(const float (&sums)[kChunks][V], T* row,
                                             bool accumulate) const {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (!has(c)) continue;
      float x[V] = {};
      if (accumulate) load(row + at(c), x);
#pragma unroll
      for (int v = 0; v < V; ++v) x[v] += sums[c][v];
      store(x, row + at(c));
    }
  }
};

template <class T, int V>
__device__ __forceinline__ void write_row(const BagGradParams& p, const Columns<V>& columns,
                                          int64_t row,
                                          const float (&sums)[Columns<V>::kChunks][V]) {
  const int64_t offset = row * p.out_stride;
  if (p.out_is_float) {
    columns.store_sums(sums, static_cast<float*>(p.out) + offset, p.accumulate);
  } else {
    columns.store_sums(sums, static_cast<T*>(p.out) + offset, p.accumulate);
  }
}

// Stores a sum of a stage of that span; the first one of a node puts the node on the list.
template <int V>
__device__ __forceinline__ void write_sum(const BagGradParams& p, const Columns<V>& columns,
                                          const Stage& stage, int64_t span, const Node& sum,
                                          const float (&sums)[Columns<V>::kChunks][V]) {
  const int64_t place = 2 * (sum.first / span) + (sum.first == sum.begin);
  columns.store_sums(sums, stage.sums + place * p.dim, false);
  if (columns.first == 0 && (sum.first - sum.begin) / span % kFan == 0) {
    stage.nodes[atomicAdd(stage.num_nodes, 1)] = sum;
  }
}

template <class T>
__device__ __forceinline__ float factor_of(const BagGradParams& p, int entry) {
  if (!p.factors) return 1.f;
  const int64_t offset = entry / p.width * p.factor_row_stride + entry % p.width * p.factor_stride;
  return p.factors_are_float ? static_cast<const float*>(p.factors)[offset]
                             : widen(static_cast<const T*>(p.factors)[offset]);
}

// Blocks: kPositions sorted entries times tiles of columns.
template <class T, int V>
__global__ void __launch_bounds__(kGradThreads)
    add_pieces(const BagGradParams p, const Stage stage) {
  constexpr int kChunks = Columns<V>::kChunks, kAtOnce = 4;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int tile = blockIdx.x % p.tiles;
  const int64_t block = blockIdx.x / p.tiles, first = block * kPositions + warp * kPiece;
  const Columns<V> columns(p, tile);
  int* const bags = reinterpret_cast<int*>(shared_memory()) + warp * 2 * kPiece;
  float* const factors =
      reinterpret_cast<float*>(shared_memory()) + (kGradWarps + warp) * 2 * kPiece;
  int* const counts = reinterpret_cast<int*>(shared_memory()) + 4 * kGradWarps * kPiece;

  // Bits are places from `first` on.
  const uint64_t used = ballot_64(is_used(p, first + lane), is_used(p, first + 32 + lane));
  const uint64_t boundaries =
      ballot_64(is_boundary(p, first + lane), is_boundary(p, first + 32 + lane));
  const uint64_t heads = used & boundaries;

  int rank = 0;  // of the first head
  if (p.rows) {
    if (lane == 0) counts[warp] = count_bits(heads);
    __syncthreads();
    rank = p.ranks[block];
    for (int w = 0; w < warp; ++w) rank += counts[w];
    const int64_t count = *p.count;
    for (int i = lane; tile == 0 && i < kPiece; i += 32) {
      if (heads >> i & 1) {
        const int before = count_bits(heads & ((uint64_t{1} << i) - 1));
        p.rows[rank + before] = p.keys[first + i];
      }
      if (first + i >= count && first + i < p.n) p.rows[first + i] = -1;
    }
    const float zeros[kChunks][V] = {};
    for (int64_t i = first > count ? first : count; i < first + kPiece && i < p.n; ++i) {
      columns.store_sums(zeros, static_cast<float*>(p.out) + i * p.dim, false);
    }
  }

  int64_t begin = first;  // of the row whose entries go on here
  uint64_t starts = heads;
  if (!(boundaries & 1)) {
    begin -= entries_before(p, first);
    const int start = static_cast<int>((begin - first) & (kPiece - 1));
    if (start < lowest_bit(boundaries)) starts |= uint64_t{1} << start;
  }
  if (starts == 0) return;
  // Only the last piece can reach the next warp's places.
  const int from = lowest_bit(starts), last = highest_bit(starts);
  const uint64_t next =
      ballot_64(is_boundary(p, first + 64 + lane), is_boundary(p, first + 96 + lane));
  const int row_end = count_bits(used) < kPiece ? count_bits(used) : kPiece + lowest_bit(next);
  const int to = row_end < last + kPiece ? row_end : last + kPiece;
  for (int i = from + lane; i < to; i += 32) {
    const int entry = p.entries[first + i];
    bags[i] = p.bags ? p.bags[entry] : entry / p.width;
    factors[i] = factor_of<T>(p, entry);
  }
  __syncwarp();

  float sums[kChunks][V] = {};
  int start = from;
  for (int i0 = from; i0 < to; i0 += kAtOnce) {
    Chunk<T, V> x[kAtOnce][kChunks];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (i0 + k >= to) break;
      const T* const row = static_cast<const T*>(p.grad) + bags[i0 + k] * p.grad_stride;
      columns.load_chunks(row, x[k]);
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int i = i0 + k;
      if (i >= to) break;
      const bool starting = i < kPiece && (starts >> i & 1);
      if (starting) start = i;
      const float factor = factors[i];
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          sums[c][v] = (starting ? 0.f : sums[c][v]) + factor * widen(x[k][c].elements[v]);
        }
      }
      const bool ends = i + 1 == to || (i + 1 < kPiece && (boundaries >> (i + 1) & 1));
      if (!ends) continue;
      const bool head = boundaries >> start & 1;
      const int64_t row = p.rows ? rank - 1 + count_bits(heads << (63 - start))
                                 : static_cast<int64_t>(p.keys[first + start]);
      if (head && (i + 1 < to || to == row_end)) {
        write_row<T>(p, columns, row, sums);
      } else {
        const int64_t piece = first + start;
        const Node sum{static_cast<uint32_t>(row), static_cast<int>(head ? piece : begin),
                       static_cast<int>(piece)};
        write_sum(p, columns, stage, kPiece, sum, sums);
      }
    }
  }
}

// Warps: nodes of sums of that span times tiles of columns.
template <class T, int V>
__global__ void __launch_bounds__(kGradThreads, 1)
    add_sums(const BagGradParams p, const Stage stage, int64_t span, const Stage next) {
  constexpr int kChunks = Columns<V>::kChunks, kAtOnce = 4;
  const int64_t warps = int64_t{gridDim.x} * kGradWarps, num_nodes = *stage.num_nodes;
  int64_t item = int64_t{blockIdx.x} * kGradWarps + threadIdx.x / 32;
  for (; item < num_nodes * p.tiles; item += warps) {
    const Node node = stage.nodes[item / p.tiles];
    const Columns<V> columns(p, static_cast<int>(item % p.tiles));
    const uint32_t key = p.keys[node.begin];
    const auto is_same = [&](int64_t place) { return place < p.n && p.keys[place] == key; };
    const int count =
        __popc(__ballot_sync(kWholeWarp, is_same(node.first + threadIdx.x % 32 * span)));
    const bool head = node.first == node.begin;
    const float* const from = stage.sums + node.first / span * 2 * p.dim;

    float sums[kChunks][V] = {};
    for (int i0 = 0; i0 < count; i0 += kAtOnce) {
      Chunk<float, V> x[kAtOnce][kChunks];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        if (i0 + k >= count) break;
        const int64_t place = 2 * (i0 + k) + (head && i0 + k == 0);
        columns.load_chunks(from + place * p.dim, x[k]);
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        if (i0 + k >= count) break;
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
#pragma unroll
          for (int v = 0; v < V; ++v) sums[c][v] += x[k][c].elements[v];
        }
      }
    }
    if (head && !is_same(node.first + kFan * span)) {
      write_row<T>(p, columns, node.row, sums);
    } else {
      write_sum(p, columns, next, kFan * span, node, sums);
    }
  }
}

}  // namespace memkernels::lookup::cuda
