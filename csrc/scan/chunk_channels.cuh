// Decays of each channel, whose products depend on pairs of tokens and on the channel.
//
// Halves of blocks of 2, 4, ... tokens: each pair i > j is in the two halves of one block. To the
// pair belongs, for each channel, the product of two numbers: what has decayed since the beginning
// of the second half up to i, which `reads`, and after j up to the end of the first, which
// `writes`. So pairs are matrix products of rows decayed up to the middle of their block, products
// of decays only, and a decay of 0 is nothing special.
#pragma once

#include "core/cuda/chunk.cuh"
#include "scan/chunk_kernel.cuh"

namespace memkernels::scan::cuda {

inline constexpr int kChannelThreads = 256;

// Whether a token is in a second half, of `half` tokens; and its place among all that are, or among
// those that are not.
__device__ __forceinline__ bool reads_half(int token, int half) { return token & half; }
__device__ __forceinline__ int place_in_halves(int token, int half) {
  return (token / 2 & -half) | (token & (half - 1));
}
__device__ __forceinline__ int token_at_place(int place, int half, bool reads) {
  return 2 * (place & -half) + (reads ? half : 0) + (place & (half - 1));
}

// Tiles of the rows of a half's products: of every 16 rows of `reads`, eight of q and the same of
// k; `writes` has rows of k.
struct HalfTiles {
  Tile reads, writes;
};
__device__ __forceinline__ int row_of_query(int place) { return place / 8 * 16 + place % 8; }

// The decays of a run of kBlock tokens, two neighbouring channels of them, which are a thread's.
template <int kTokens>
struct ChannelRun {
  static constexpr int kRuns = kTokens / kBlock;

  int first, channel;  // the first of the tokens, and of the channels
  bool used;
  float decay[kBlock][2];
  float* totals;  // [kRuns][columns] in shared memory
  int columns;

  // columns: a multiple of 16 / sizeof(T), of which a chunk has 16 KiB at most.
  __device__ __forceinline__ ChannelRun(float* totals, int columns)
      : first(static_cast<int>(threadIdx.x) / (columns / 2) * kBlock),
        channel(static_cast<int>(threadIdx.x) % (columns / 2) * 2),
        used(first < kTokens),
        totals(totals),
        columns(columns) {}

  // Tokens that do not exist decay by 1, and channels.
  template <class T>
  __device__ __forceinline__ void load(const ChunkParams& p, const ChunkOf& chunk, int head) {
    if (!used) return;
    p.g.is_float ? load_rows<float>(p, chunk, head) : load_rows<T>(p, chunk, head);
    float total[2] = {1.f, 1.f};
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        decay[i][e] = expf(decay[i][e]);
        total[e] *= decay[i][e];
      }
    }
    float* const to = totals + first / kBlock * columns + channel;
    to[0] = total[0], to[1] = total[1];
  }

  // Calls body(number in the run, what has decayed since the half's beginning) for tokens of a
  // second half; for all with kTokens.
  template <class Body>
  __device__ __forceinline__ void for_reads(int half, const Body& body) const {
    float product[2] = {1.f, 1.f};
    multiply(product, first & -half, first);
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      if (half < kTokens && !reads_half(first + i, half)) continue;
      if (i > 0 && (i & (half - 1)) == 0) product[0] = product[1] = 1.f;
      product[0] *= decay[i][0], product[1] *= decay[i][1];
      body(i, product);
    }
  }

  // And, from the last to the first, body(number, what decays after it to the half's end) for those
  // of a first half; for all with kTokens.
  template <class Body>
  __device__ __forceinline__ void for_writes(int half, const Body& body) const {
    float product[2] = {1.f, 1.f};
    multiply(product, first + kBlock, (first & -half) + half);
#pragma unroll
    for (int i = kBlock - 1; i >= 0; --i) {
      if (half < kTokens && reads_half(first + i, half)) continue;
      if (i < kBlock - 1 && (~i & (half - 1)) == 0) product[0] = product[1] = 1.f;
      body(i, product);
      product[0] *= decay[i][0], product[1] *= decay[i][1];
    }
  }

  // The rows of a half's products; factors: of k as it reads, by tokens, or absent: there are none.
  template <class T>
  __device__ __forceinline__ void decay_rows(const HalfTiles& tiles, const Tile& q, const Tile& k,
                                             int half, const float* factors) const {
    if (!used) return;
    for_reads(half, [&](int i, const float (&product)[2]) {
      const int token = first + i, row = row_of_query(place_in_halves(token, half));
      decay_pair<T>(tiles.reads, row, q, token, product);
      if (!factors) return;
      const float scaled[2] = {product[0] * factors[token], product[1] * factors[token]};
      decay_pair<T>(tiles.reads, row + 8, k, token, scaled);
    });
    for_writes(half, [&](int i, const float (&product)[2]) {
      decay_pair<T>(tiles.writes, place_in_halves(first + i, half), k, first + i, product);
    });
  }

  template <class T>
  __device__ __forceinline__ void decay_pair(const Tile& to, int row, const Tile& from, int token,
                                             const float (&product)[2]) const {
    float x[2];
    memkernels::cuda::load<T, 2>(from.element<T>(token, channel), x);
    store_pair(to.element<T>(row, channel), x[0] * product[0], x[1] * product[1]);
  }

 private:
  template <class G>
  __device__ __forceinline__ void load_rows(const ChunkParams& p, const ChunkOf& chunk, int head) {
    const TokenRows& rows = p.g.rows;
    const G* const g = row_at<G>(rows, chunk.batch, chunk.begin + first, head) + channel;
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const bool inside = first + i < chunk.count && channel + e < p.keys;
        decay[i][e] = inside ? widen(g[i * rows.token_stride + e]) : 0.f;
      }
    }
  }

  // By whole runs.
  __device__ __forceinline__ void multiply(float (&product)[2], int begin, int end) const {
    for (int token = begin; token < end; token += kBlock) {
      const float* const total = totals + token / kBlock * columns + channel;
      product[0] *= total[0], product[1] *= total[1];
    }
  }
};

}  // namespace memkernels::scan::cuda
