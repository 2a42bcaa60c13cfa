// From the sums of chunk_gradients_kernel.cuh to the gradients, with a decay of each channel. Pairs
// by halves of blocks, as chunk_channels.cuh has them: with R of q and of k the rows that read, W
// those that write,
//   dq_i = what reads (dscores W)_i,  dk_i = what reads (dsolve W)_i,
//   dk_j = what writes (dscores^T Rq + dsolve^T Rk)_j
// are products of matrices, but those in leaves of kLeaf tokens, which are sums of each channel's.
// The state is as one half that reads, or writes, after or before all of the chunk.
//
// The gradient of a decay of a second half is the sum of q dq + k dk of those from it on, as they
// read; of a first half that of k dk of those before it. A pair is across a decay of one half only,
// so that no terms cancel.
//
// Cost beside that of the sums: 8 C K flops a token and head on tensor cores and some 36 K of each
// channel; g is read and dg written.
#pragma once

#include "scan/chunk_channels.cuh"
#include "scan/chunk_gradients_kernel.cuh"

namespace memkernels::scan::cuda {

inline constexpr int kLeaf = 8;

// What lies beside q and k after the sums over V.
template <class T, int kDim>
struct ChannelMemory {
  using Shape = GradientShape<T, kDim>;
  static constexpr int kTokens = Shape::kTokens, kRuns = kTokens / kBlock;

  static constexpr int kPitch = kDim + 8;

  int columns;       // K rounded up to a step of products
  float* sums;       // [3 / 2 kTokens][kPitch] from products to where channels are
  HalfTiles halves;  // behind `writes` zeros follow, what is left of a step
  Tile pairs;        // of every 16 rows eight of dscores, and of dsolve, with factors of the rows;
                     // zeros above the diagonal and in leaves
  float *leaf_scores, *leaf_solve;  // [kTokens][kLeaf] of a token that writes, what reads
  float* diagonal;                  // [kTokens] of dscores
  float* totals;                    // [kRuns][columns] of decays, and
  float* outside;  // [3][kRuns][columns] what runs have for others: of reads, writes, of a half
  int bytes;

  __host__ __device__ __forceinline__ ChannelMemory(char* memory, const ChunkParams& c) {
    columns = (c.keys + Shape::kDepth - 1) / Shape::kDepth * Shape::kDepth;
    char* next = memory;
    const auto take = [&](int64_t count) {
      char* const data = next;
      next += pitch_of(count);
      return data;
    };
    const auto numbers = [&](int count) {
      return reinterpret_cast<float*>(take(count * sizeof(float)));
    };
    sums = numbers(kTokens / 2 * 3 * kPitch);
    halves.reads = {take(kTokens * Shape::kKeyPitch), Shape::kKeyPitch};
    halves.writes = {take((kTokens / 2 + kLeaf) * Shape::kKeyPitch), Shape::kKeyPitch};
    pairs = {take(2 * kTokens * Shape::kPairPitch), Shape::kPairPitch};
    leaf_scores = numbers(kTokens * kLeaf);
    leaf_solve = numbers(kTokens * kLeaf);
    diagonal = numbers(kTokens);
    totals = numbers(kRuns * columns);
    outside = numbers(3 * kRuns * columns);
    bytes = static_cast<int>(next - memory);
  }
};

// Gradients of the tokens and channels of a thread's run.
struct RunGradients {
  float dq[kBlock][2], dk[kBlock][2], dg[kBlock][2];
  float erased[kBlock];  // k times the gradient of what it erases, over beta
};

// What a run's tokens have to do with decays: adds to dg the sums of `products`, which are those of
// tokens that read times their gradients, over a token and those after it in the half; and to
// `outside`, if there is more of the half, what the sum is for the runs before.
template <int kTokens>
__device__ __forceinline__ void add_reads(RunGradients& x, const ChannelRun<kTokens>& run, int half,
                                          const float (&products)[kBlock][2], float* outside) {
  float later[2] = {};
#pragma unroll
  for (int i = kBlock - 1; i >= 0; --i) {
    if (half < kTokens && !reads_half(run.first + i, half)) continue;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      later[e] += products[i][e];
      x.dg[i][e] += later[e];
      if (half < kBlock && i % half == 0) later[e] = 0.f;
    }
  }
  if (outside) outside[0] += later[0], outside[1] += later[1];
}

// The same of tokens that write, over those before a token, for the runs after.
template <int kTokens>
__device__ __forceinline__ void add_writes(RunGradients& x, const ChannelRun<kTokens>& run,
                                           int half, const float (&products)[kBlock][2],
                                           float* outside) {
  float earlier[2] = {};
#pragma unroll
  for (int i = 0; i < kBlock; ++i) {
    if (half < kTokens && reads_half(run.first + i, half)) continue;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (half < kBlock && i % half == 0) earlier[e] = 0.f;
      x.dg[i][e] += earlier[e];
      earlier[e] += products[i][e];
    }
  }
  if (outside) outside[0] += earlier[0], outside[1] += earlier[1];
}

// A warp's sums to memory, [rows][pitch], the first `rows` of each tile, and as far as `columns`.
template <int kTiles, int kBlocks>
__device__ __forceinline__ void store_sums(const Sums<kTiles, kBlocks>& sums, float* to, int pitch,
                                           int row, int rows, int column, int columns) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const int c = column + 8 * block + lane % 4 * 2;
      if (c >= columns) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (8 * half >= rows) continue;
        const float pair[2] = {sums.c[tile][block][2 * half], sums.c[tile][block][2 * half + 1]};
        store(pair, to + (row + 16 * tile + lane / 4 + 8 * half) * pitch + c);
      }
    }
  }
}

// Gradients of scores and of what is solved, as products take them.
template <class T, int kDim>
__device__ __forceinline__ void store_pairs(const ChunkSums<T, kDim>& sums,
                                            const GradientMemory<T, kDim>& memory,
                                            const ChannelMemory<T, kDim>& channels, float scale) {
  using Shape = GradientShape<T, kDim>;
  constexpr int kTokens = Shape::kTokens;
  const auto place = ChunkSums<T, kDim>::place();
  const int lane = threadIdx.x % 32;
  if (place.pair_row >= kTokens) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = place.pair_row + lane / 4 + 8 * half;
    const float inverse = memory.inverse[i], dnormalizer = memory.dnormalizer[i];
#pragma unroll
    for (int block = 0; block < Shape::kPairBlocks; ++block) {
      const int first = place.pair_column + 8 * block + lane % 4 * 2;
      float of_scores[2], of_solve[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int j = first + e, at = 2 * half + e;
        float dscore = (sums.dscores.c[0][block][at] * inverse + dnormalizer) * scale;
        float dsolve = -sums.dsolve.c[0][block][at];
        if (j == i) channels.diagonal[i] = dscore;
        if (j / kLeaf == i / kLeaf) {
          channels.leaf_scores[j * kLeaf + i % kLeaf] = dscore;
          channels.leaf_solve[j * kLeaf + i % kLeaf] = dsolve;
        }
        if (j / kLeaf >= i / kLeaf) dscore = dsolve = 0.f;
        of_scores[e] = dscore, of_solve[e] = dsolve;
      }
      const int row = row_of_query(i);
      store_pair(channels.pairs.template element<T>(row, first), of_scores[0], of_scores[1]);
      store_pair(channels.pairs.template element<T>(row + 8, first), of_solve[0], of_solve[1]);
    }
  }
}

// Pairs within leaves.
template <class T, int kDim, int kTokens>
__device__ __forceinline__ void through_leaves(RunGradients& x, const ChannelRun<kTokens>& run,
                                               const Tile& q, const Tile& k, const float* betas,
                                               const ChannelMemory<T, kDim>& channels) {
#pragma unroll
  for (int leaf = 0; leaf < kBlock; leaf += kLeaf) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float queries[kLeaf], keys[kLeaf], erases[kLeaf], of_erases[kLeaf] = {};
#pragma unroll
      for (int i = 0; i < kLeaf; ++i) {
        const int token = run.first + leaf + i;
        queries[i] = widen(*q.element<T>(token, run.channel + e));
        keys[i] = widen(*k.element<T>(token, run.channel + e));
        erases[i] = keys[i] * betas[token];
      }
#pragma unroll
      for (int j = 0; j + 1 < kLeaf; ++j) {
        const int pairs = (run.first + leaf + j) * kLeaf;
        float dscores[kLeaf], dsolve[kLeaf], products[kLeaf], decayed = 1.f, later = 0.f;
        load(channels.leaf_scores + pairs, dscores);
        load(channels.leaf_solve + pairs, dsolve);
#pragma unroll
        for (int i = j + 1; i < kLeaf; ++i) {
          decayed *= run.decay[leaf + i][e];
          const float key = keys[j] * decayed;
          x.dq[leaf + i][e] += key * dscores[i];
          of_erases[i] += key * dsolve[i];
          products[i] = decayed * (queries[i] * dscores[i] + erases[i] * dsolve[i]);
        }
#pragma unroll
        for (int i = kLeaf - 1; i > j; --i) {
          later += products[i];
          x.dg[leaf + i][e] += keys[j] * later;
        }
        x.dk[leaf + j][e] += later;
      }
#pragma unroll
      for (int i = 0; i < kLeaf; ++i) {
        x.dk[leaf + i][e] += of_erases[i] * betas[run.first + leaf + i];
        x.erased[leaf + i] -= of_erases[i] * keys[i];
      }
    }
  }
}

// The products of a half of at least kLeaf tokens, a warp's share of 16 rows and 32 columns at a
// time: of all that read, in rows as those of `pairs`; behind them of those that write.
template <class T, int kDim>
__device__ __forceinline__ void multiply_half(const ChannelMemory<T, kDim>& channels, int half) {
  using Shape = GradientShape<T, kDim>;
  constexpr int kTokens = Shape::kTokens, kDepth = Shape::kDepth, kBlocks = Shape::kKeys / 8;
  const auto& [reads, writes] = channels.halves;
  const int parts = (channels.columns - 1) / Shape::kKeys + 1;
  const int readers = kTokens / 16, writers = half < 16 ? kTokens / 16 : kTokens / 32;
  for (int task = threadIdx.x / 32; task < (readers + writers) * parts; task += Shape::kWarps) {
    const int number = task / parts, column = task % parts * Shape::kKeys;
    Sums<1, kBlocks> sums;
    sums.clear();
    const auto add = [&](const uint32_t (&a)[4], const Tile& b, int row) {
#pragma unroll
      for (int block = 0; block < kBlocks; block += 2) {
        uint32_t right[2][2];
        load_two_blocks(T(), right, b, row, column / 8 + block);
        multiply_add(T(), sums.c[0][block], a, right[0]);
        multiply_add(T(), sums.c[0][block + 1], a, right[1]);
      }
    };
    int row, rows = 16;
    if (number < readers) {
      row = 16 * number;
      const int i = token_at_place(8 * number, half, true), j = i & -(2 * half);
      for (int step = 0; step < half; step += kDepth) {
        uint32_t a[4];
        load_left(T(), a, channels.pairs, row_of_query(i), (j + step) / kDepth);
        add(a, writes, place_in_halves(j, half) + step);
      }
    } else {
      // Of halves of eight, 16 rows have eight that write.
      const int j = half < 16 ? 16 * (number - readers)
                              : token_at_place(16 * (number - readers), half, false);
      const int begin = (j & -(2 * half)) + half;
      row = kTokens + place_in_halves(j, half);
      if (half < 16) rows = half;
      for (int i = begin; i < begin + half; i += 8) {
        for (int step = 0; step < 16; step += kDepth) {
          uint32_t a[4];
          load_left_transposed(T(), a, channels.pairs, row_of_query(i) + step, j);
          add(a, reads, row_of_query(place_in_halves(i, half)) + step);
        }
      }
    }
    store_sums(sums, channels.sums, channels.kPitch, row, rows, column, channels.columns);
  }
}

// Writes two channels of a row, or what is left of its `dim`.
template <class T>
__device__ __forceinline__ void write_channels(void* to, int64_t row, int dim, int channel,
                                               const float (&x)[2]) {
  T* const data = static_cast<T*>(to) + row * dim + channel;
  if (dim % 2 == 0) return store_pair(data, x[0], x[1]);
  narrow(x[0], data[0]);
  if (channel + 1 < dim) narrow(x[1], data[1]);
}

template <class T, int kDim>
__device__ __forceinline__ void through_channel_decays(ChunkSums<T, kDim>& sums,
                                                       const GradientMemory<T, kDim>& memory,
                                                       const ChunkGradParams& p,
                                                       const ChunkOf& chunk, int head, int slices) {
  using Shape = GradientShape<T, kDim>;
  constexpr int kTokens = Shape::kTokens, kRuns = kTokens / kBlock;
  const ChunkParams& c = p.c;
  const bool delta = c.beta.rows.data != nullptr;
  const int tid = threadIdx.x;
  const int64_t unit = blockIdx.x;
  const auto place = ChunkSums<T, kDim>::place();
  const Tile q = memory.query_rows(p, slices), k = memory.key_rows(p, slices);
  const float* const betas = memory.beta;
  __syncthreads();
  const ChannelMemory<T, kDim> channels(memory.rest(p, slices), c);
  constexpr int kPitch = ChannelMemory<T, kDim>::kPitch;
  const int columns = channels.columns;
  ChannelRun<kTokens> run(channels.totals, columns);
  const int first = run.first, channel = run.channel, runs = kRuns * columns;
  float* const own = channels.outside + first / kBlock * columns + channel;

  const auto store_rows = [&](const auto& x) {
    if (place.key < columns) {
      store_sums(x, channels.sums, kPitch, place.row, 16, place.key, columns);
    }
    __syncthreads();
  };
  const auto load_row = [&](int row, float (&to)[2]) {
    load(channels.sums + row * kPitch + channel, to);
  };
  run.template load<T>(c, chunk, head);
  const int zeros = kTokens / 2 * channels.halves.writes.pitch;
  for (int i = tid; i < kLeaf * channels.halves.writes.pitch / 4; i += Shape::kThreads) {
    reinterpret_cast<uint32_t*>(channels.halves.writes.data + zeros)[i] = 0;
  }
  if (c.qk_l2norm) {
    normalize_rows<T, kTokens>(memory.q_norm, q, c.keys);
    normalize_rows<T, kTokens>(memory.k_norm, k, c.keys);
  }
  store_pairs(sums, memory, channels, c.scale);
  store_rows(sums.dread);

  // Where tokens meet the state.
  RunGradients x = {};
  float products[kBlock][2] = {}, z[2] = {}, dz[2] = {};
  for (int e = 0; run.used && e < 2; ++e) {
    for (int i = 0; i < 3; ++i) own[i * runs + e] = 0.f;
    if (!p.dnormalizers || channel + e >= c.keys) continue;
    z[e] = p.zs[unit * c.key_row + channel + e];
    dz[e] = p.dzs[unit * c.key_row + channel + e];
  }
  if (run.used) {
    run.for_reads(kTokens, [&](int i, const float (&decayed)[2]) {
      const int token = first + i;
      float dread[2], query[2];
      load_row(token, dread);
      load(q.element<T>(token, channel), query);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float gradient = dread[e] * memory.inverse[token] + z[e] * memory.dnormalizer[token];
        x.dq[i][e] = gradient * decayed[e] * c.scale;
        products[i][e] = query[e] * x.dq[i][e];
      }
    });
  }
  if (delta) {
    __syncthreads();
    store_rows(sums.derase);
    if (run.used) {
      run.for_reads(kTokens, [&](int i, const float (&decayed)[2]) {
        const int token = first + i;
        float derase[2], key[2];
        load_row(token, derase);
        load(k.element<T>(token, channel), key);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float gradient = derase[e] * decayed[e];
          x.dk[i][e] = -gradient * betas[token];
          x.erased[i] += key[e] * gradient;
          products[i][e] += key[e] * x.dk[i][e];
        }
      });
    }
  }
  __syncthreads();
  store_rows(sums.dwrite);
  if (run.used) {
    add_reads(x, run, kTokens, products, own);
    run.for_writes(kTokens, [&](int i, const float (&decays)[2]) {
      const int token = first + i;
      float dwrite[2], key[2];
      load_row(token, dwrite);
      load(k.element<T>(token, channel), key);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float gradient = (dwrite[e] + dz[e]) * decays[e];
        x.dk[i][e] += gradient;
        products[i][e] = key[e] * gradient;
      }
    });
    add_writes(x, run, kTokens, products, own + runs);
    through_leaves(x, run, q, k, betas, channels);
  }

#pragma unroll
  for (int half = kLeaf; half < kTokens; half *= 2) {
    run.template decay_rows<T>(channels.halves, q, k, half, betas);
    __syncthreads();
    multiply_half(channels, half);
    __syncthreads();
    if (!run.used) continue;
    float* const outside = half > kBlock ? own + 2 * runs : nullptr;
    run.for_reads(half, [&](int i, const float (&decayed)[2]) {
      const int token = first + i, row = row_of_query(place_in_halves(token, half));
      float of_query[2], of_key[2], query[2], key[2];
      load_row(row, of_query);
      load_row(row + 8, of_key);
      load(q.element<T>(token, channel), query);
      load(k.element<T>(token, channel), key);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float dquery = of_query[e] * decayed[e], read = of_key[e] * decayed[e];
        const float dkey = read * betas[token];
        x.dq[i][e] += dquery;
        x.dk[i][e] += dkey;
        x.erased[i] -= key[e] * read;
        products[i][e] = query[e] * dquery + key[e] * dkey;
      }
    });
    add_reads(x, run, half, products, outside);
    run.for_writes(half, [&](int i, const float (&decays)[2]) {
      const int token = first + i;
      float gradient[2], key[2];
      load_row(kTokens + place_in_halves(token, half), gradient);
      load(k.element<T>(token, channel), key);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float dkey = gradient[e] * decays[e];
        x.dk[i][e] += dkey;
        products[i][e] = key[e] * dkey;
      }
    });
    add_writes(x, run, half, products, outside);
  }
  __syncthreads();

  // The diagonal, and of dot products of rows each thread's part, in turns.
  const int pairs = columns / 2, part_pitch = pairs + 1;
  float* const parts = channels.sums + first * part_pitch + channel / 2;
  if (run.used) {
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      float query[2], key[2], of_query = 0.f, of_key = 0.f;
      load(q.element<T>(first + i, channel), query);
      load(k.element<T>(first + i, channel), key);
      const float diagonal = channels.diagonal[first + i];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        x.dq[i][e] += key[e] * diagonal;
        x.dk[i][e] += query[e] * diagonal;
        of_query += query[e] * x.dq[i][e];
        of_key += key[e] * x.dk[i][e];
      }
      parts[i * part_pitch] = x.erased[i];
      parts[(kTokens + i) * part_pitch] = of_query;
      parts[(2 * kTokens + i) * part_pitch] = of_key;
    }
  }
  __syncthreads();
  const int64_t token = chunk.batch * c.sequences.tokens + chunk.begin;
  float* const along[] = {memory.erased, memory.reads, memory.writes};
  for (int row = tid / 4; row < 3 * kTokens; row += Shape::kThreads / 4) {
    float sum = 0.f;
    for (int i = tid % 4; i < pairs; i += 4) sum += channels.sums[row * part_pitch + i];
    sum += __shfl_xor_sync(kWholeWarp, sum, 1);
    sum += __shfl_xor_sync(kWholeWarp, sum, 2);
    if (tid % 4 == 0) along[row / kTokens][row % kTokens] = sum;
  }
  __syncthreads();
  if (p.dbeta && tid < chunk.count) {
    p.dbeta[(token + tid) * c.heads + head] = memory.of_values[tid] - memory.erased[tid];
  }
  if (!run.used || channel >= c.keys) return;

  const int count = chunk.count - first < kBlock ? chunk.count - first : kBlock;
  float constant[2] = {};
  for (int e = 0; p.dg && e < 2; ++e) {
    if (channel + e < c.keys) constant[e] = memory.dtotal[channel + e];
    const float* const outside = channels.outside + channel + e;
    const int number = first / kBlock;
    for (int i = 0; i < kRuns; ++i) {
      if (i > number) constant[e] += outside[i * columns];
      if (i < number) constant[e] += outside[i * columns + runs];
      const bool reads = number & 2;
      if (i != number && i / 2 == number / 2 && (i > number) == reads) {
        constant[e] += outside[i * columns + 2 * runs];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kBlock; ++i) {
    if (i >= count) break;
    const int64_t row = (token + first + i) * c.heads + head;
    if (p.dg) {
      const float dg[2] = {x.dg[i][0] + constant[0], x.dg[i][1] + constant[1]};
      write_channels<float>(p.dg, row, c.keys, channel, dg);
    }
    const auto write = [&](void* to, const Tile& tile, const float (&gradient)[2],
                           const float* norms, const float* dots) {
      if (!to) return;
      float y[2] = {gradient[0], gradient[1]};
      if (c.qk_l2norm) {
        float of_row[2];
        load(tile.element<T>(first + i, channel), of_row);
        for (int e = 0; e < 2; ++e) {
          y[e] = (y[e] - of_row[e] * dots[first + i]) * norms[first + i];
        }
      }
      p.dqk_is_float ? write_channels<float>(to, row, c.keys, channel, y)
                     : write_channels<T>(to, row, c.keys, channel, y);
    };
    write(p.dq, q, x.dq[i], memory.q_norm, memory.reads);
    write(p.dk, k, x.dk[i], memory.k_norm, memory.writes);
  }
}

}  // namespace memkernels::scan::cuda
