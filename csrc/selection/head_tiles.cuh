// The heads of queries, one query after another, and their tiles in shared memory: the columns of
// products whose rows are keys. Those of a query are padded to blocks of 8.
#pragma once

#include "attention/key_stream.cuh"
#include "selection/indexer_scores_cuda.h"

namespace memkernels::selection::cuda {

template <class T>
__device__ __forceinline__ float weight_at(const IndexerParams& p, int query, int head) {
  return attention::cuda::companion_at<T>(p.w, p.w_is_float,
                                          query * p.w_stride + head * p.w_head_stride);
}

struct alignas(8) PairOfWeights {
  float first, second;
};

// Walks over the heads of a run of queries, kColumns at a time. Once before the loop: start; in
// every round: wait, __syncthreads, advance.
template <class T, int kColumns>
class HeadTiles {
 public:
  __device__ __forceinline__ HeadTiles(const IndexerParams& p, char* tiles, float* weights)
      : p_(p), tiles_(tiles), weights_(weights) {}

  // Nobody reads the stages any more.
  __device__ __forceinline__ void start(int query, int count) {
    query_ = query;
    end_ = count * 8 * p_.head_blocks;
    tile_ = 0;
    keep(0, weight_in(0));
    next_ = weight_in(1);
    load(0);
  }
  __device__ __forceinline__ bool more() const { return tile_ * kColumns < end_; }
  __device__ __forceinline__ void advance() {
    keep(tile_ + 1, next_);
    next_ = weight_in(tile_ + 2);
    load(tile_ + 1);
  }
  __device__ __forceinline__ void finish() { ++tile_; }

  __device__ __forceinline__ Tile heads() const { return heads_in(tile_); }
  // Of a thread's columns of a block.
  __device__ __forceinline__ PairOfWeights weights(int block) const {
    const int column = 8 * block + static_cast<int>(threadIdx.x) % 4 * 2;
    return *reinterpret_cast<const PairOfWeights*>(weights_ + tile_ % 2 * kColumns + column);
  }

 private:
  struct Column {
    int query, head;
    bool used;
  };
  __device__ __forceinline__ Column column(int tile, int i) const {
    const int column = tile * kColumns + i, width = 8 * p_.head_blocks;
    const int query = column / width, head = column - query * width;
    if (column >= end_ || head >= p_.a.num_heads) return {query_, 0, false};
    return {query_ + query, head, true};
  }

  __device__ __forceinline__ Tile heads_in(int tile) const {
    const int pitch = pitch_of(p_.a.dim * sizeof(T));
    return {tiles_ + tile % p_.stages * kColumns * pitch, pitch};
  }

  __device__ __forceinline__ float weight_in(int tile) const {
    if (threadIdx.x >= kColumns) return 0.f;
    const Column c = column(tile, threadIdx.x);
    return c.used ? weight_at<T>(p_, c.query, c.head) : 0.f;
  }
  __device__ __forceinline__ void keep(int tile, float weight) const {
    if (threadIdx.x < kColumns) weights_[tile % 2 * kColumns + threadIdx.x] = weight;
  }

  __device__ __forceinline__ void load(int tile) const {
    constexpr int kLanes = 8;
    if (tile * kColumns < end_) {
      const Tile to = heads_in(tile);
      for (int i = threadIdx.x / kLanes; i < kColumns; i += kIndexerThreads / kLanes) {
        const Column c = column(tile, i);
        copy_row<T, kLanes>(
            to, i,
            static_cast<const T*>(p_.a.q) + c.query * p_.a.q_stride + c.head * p_.a.q_head_stride,
            p_.a.dim, threadIdx.x % kLanes, p_.a.aligned, c.used);
      }
    }
    commit_copies();
  }

  const IndexerParams& p_;
  char* const tiles_;
  float* const weights_;
  int query_ = 0, end_ = 0;  // first query; behind the last column
  int tile_ = 0;             // worked on
  float next_ = 0.f;         // weight of the tile after the next
};

}  // namespace memkernels::selection::cuda
