// The backward of attention. With P = softmax(logits), dP = dout v^T, delta = dout . out - dlse:
//
//   dS = P (dP - delta);  dq = scale dS k;  dk = scale dS^T q;  dv = P^T dout;
//   dkey_bias = sum of dS over queries;  dsink = -sum of P_sink delta
//
// where a soft cap multiplies what goes on to q and k by 1 - tanh^2. Logits and dP are computed
// again, once by blocks of queries, which own dq, and once by blocks of keys, which own dk, dv and
// dkey_bias: no sum is shared, so all are deterministic. A page that several sequences hold, or
// queries list, is one block's, which walks over its entries in the order of a stable sort.
//
// Cost: 10 D flops a pair of query and key that see each other and 4 D more for logits and dP
// computed twice, 2.5 and 3.5 forwards: bound by mma.sync.
#pragma once

#include "attention/paged_attention_kernel.cuh"
#include "attention/row_tiles.cuh"

namespace memkernels::attention::cuda {

// ---- of rows

inline constexpr int kRowsOfBlock = 4;

// A warp a row.
template <class T>
__global__ void __launch_bounds__(32 * kRowsOfBlock, 1) find_deltas(const BackwardParams p) {
  const int64_t row = int64_t{blockIdx.x} * kRowsOfBlock + threadIdx.x / 32;
  if (row >= int64_t{p.a.total_q} * p.a.num_heads) return;
  const int lane = threadIdx.x % 32;
  const T* const out = static_cast<const T*>(p.out) + row * p.a.dim_v;
  const T* const dout = static_cast<const T*>(p.dout) + row / p.a.num_heads * p.dout_stride +
                        row % p.a.num_heads * p.dout_head_stride;
  float delta = 0.f;
  for (int d = lane; d < p.a.dim_v; d += 32) delta += widen(out[d]) * widen(dout[d]);
  for (int lanes = 16; lanes > 0; lanes /= 2) delta += __shfl_xor_sync(kWholeWarp, delta, lanes);
  if (lane > 0) return;
  const int64_t query = row / p.a.num_heads;
  if (p.a.cu_seqlens_q.data &&
      (query < first_query(p.a, 0) || query >= first_query(p.a, p.a.num_sequences))) {
    p.rows[row] = {kInfinity, 0.f};  // of no sequence
    return;
  }
  if (p.dlse) delta -= p.dlse[row];
  const float lse = p.lse[row] * kLog2e;
  p.rows[row] = {lse == -kInfinity ? kInfinity : lse, delta};
}

// A block a head.
template <class T>
__global__ void __launch_bounds__(256, 1) find_dsink(const BackwardParams p) {
  const int head = blockIdx.x, tid = threadIdx.x;
  float* const sums = reinterpret_cast<float*>(shared_memory());
  const float sink = sink_of<T>(p.a, head) * kLog2e;
  float sum = 0.f;
  for (int64_t q = tid; q < p.a.total_q; q += 256) {
    const RowGradient row = p.rows[q * p.a.num_heads + head];
    if (row.lse != kInfinity) sum -= exp2f(sink - row.lse) * row.delta;
  }
  sums[tid] = sum;
  for (int n = 128; n > 0; n /= 2) {
    __syncthreads();
    if (tid < n) sums[tid] += sums[tid + n];
  }
  if (tid > 0) return;
  if (p.a.sink_is_float) {
    static_cast<float*>(p.dsink_logit)[head] = sums[0];
  } else {
    narrow(sums[0], static_cast<T*>(p.dsink_logit)[head]);
  }
}

// A logit, base 2, from a product; and the derivative of its soft cap.
__device__ __forceinline__ float finish_logit(const AttentionParams& p, float product, float bias,
                                              float* slope) {
  float x = product * p.scale;
  *slope = 1.f;
  if (p.softcap > 0) {
    const float t = tanhf(x / p.softcap);
    x = p.softcap * t;
    *slope = 1.f - t * t;
  }
  return x * kLog2e + bias;
}

// ---- dq

template <class T, int kDim>
struct QueryShape {
  static constexpr int kRows = rows_of_dq(sizeof(T), kDim);
  static constexpr int kWarpsOverColumns = kRows == 16 ? 4 : 1;  // of dq; dS is computed by each
  static constexpr int kThreads = 2 * kRows * kWarpsOverColumns;
  static constexpr int kKeys = keys_of_tile(sizeof(T), kDim);
  static constexpr int kColumnBlocks = kDim / 8 / kWarpsOverColumns;
};

template <class T, int kDim>
__global__ void __launch_bounds__(QueryShape<T, kDim>::kThreads, 1)
    find_dq(const BackwardParams params) {
  using S = QueryShape<T, kDim>;
  using Tiles = KeyTiles<T, kDim, S::kKeys, S::kThreads>;
  const AttentionParams& p = params.a;
  const int tid = threadIdx.x, lane = tid % 32;
  const int warp_row = tid / 32 / S::kWarpsOverColumns * 16;
  const int warp_column = tid / 32 % S::kWarpsOverColumns;

  // q [kRows][D], dout [kRows][Dv], tiles of keys and values, their places.
  char* const memory = shared_memory();
  const Tile q{memory, pitch_of(p.dim * sizeof(T))};
  const Tile dout{memory + S::kRows * q.pitch, pitch_of(p.dim_v * sizeof(T))};
  char* const tile_memory = dout.data + S::kRows * dout.pitch;
  const int tile_bytes = p.stages * Tiles::tile_bytes(p);
  Key* const places = reinterpret_cast<Key*>(tile_memory + tile_bytes);

  const int64_t block = gridDim.x - 1 - blockIdx.x;
  const int head = static_cast<int>(block % p.num_kv_heads);
  Stream s;
  if (!find_stream<S::kRows, S::kThreads>(p, block / p.num_kv_heads, 0, head,
                                          reinterpret_cast<int*>(places), s)) {
    return;
  }
  enter_split(s, 0);
  const int steps = (p.dim * static_cast<int>(sizeof(T)) + 31) / 32;
  const int v_steps = (p.dim_v * static_cast<int>(sizeof(T)) + 31) / 32;
  if (p.dim * sizeof(T) % 32 != 0 || p.dim_v * sizeof(T) % 32 != 0) {
    fill_zeros<S::kThreads>(memory, S::kRows * (q.pitch + dout.pitch) + tile_bytes);
    __syncthreads();
  }
  load_queries<T, Tiles::kLanes, S::kRows, S::kThreads>(q, p, s, head, p.q, p.q_stride,
                                                        p.q_head_stride, p.dim, p.aligned);
  load_queries<T, Tiles::kLanes, S::kRows, S::kThreads>(dout, p, s, head, params.dout,
                                                        params.dout_stride, params.dout_head_stride,
                                                        p.dim_v, params.dout_aligned);
  Tiles tiles(p, s, head, tile_memory, places, true);
  tiles.start();

  int position[1][2];
  find_positions(position, p, s, warp_row);
  RowGradient rows[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = s.first_row + warp_row + lane / 4 + 8 * half, query = row / p.group;
    rows[half] = {kInfinity, 0.f};
    if (query < s.num_queries) {
      rows[half] =
          params.rows[(s.query + int64_t{query}) * p.num_heads + head * p.group + row % p.group];
    }
  }
  const int first_seen = s.first_position + (s.first_row + warp_row) / p.group;
  const int last_seen = s.first_position + (s.first_row + warp_row + 15) / p.group;

  Sums<1, S::kColumnBlocks> dq;
  dq.clear();
  for (; tiles.more(); tiles.finish()) {
    tiles.wait();
    __syncthreads();
    tiles.advance();
    const bool seen_whole = tiles.seen_whole(first_seen, last_seen);
    Sums<1, S::kKeys / 8> x, y;
    x.clear();
    y.clear();
    multiply_rows<T>(x, q, warp_row, tiles.keys(), 0, steps);
    multiply_rows<T>(y, dout, warp_row, tiles.values(), 0, v_steps);
#pragma unroll
    for (int block = 0; block < S::kKeys / 8; ++block) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        Key key{0, 0, 0, 0.f};
        if (!seen_whole) key = tiles.place(8 * block + lane % 4 * 2 + e % 2);
        const bool seen = seen_whole || sees(p, s, position[0][e / 2], key.position);
        float slope;
        const float logit = finish_logit(p, x.c[0][block][e], key.bias, &slope);
        const float weight = exp2_fast(logit - rows[e / 2].lse);
        x.c[0][block][e] = seen ? weight * (y.c[0][block][e] - rows[e / 2].delta) * slope : 0.f;
      }
    }
    multiply_columns<T>(dq, x, tiles.keys(), 0, warp_column * S::kColumnBlocks, p.dim);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = s.first_row + warp_row + lane / 4 + 8 * half, query = row / p.group;
    if (query >= s.num_queries) continue;
    const int64_t to = (s.query + int64_t{query}) * p.num_heads + head * p.group + row % p.group;
    store_row(static_cast<T*>(params.dq) + to * p.dim, dq.c[0], half, p.scale,
              8 * warp_column * S::kColumnBlocks, p.dim);
  }
}

// ---- dk, dv, dkey_bias

// Sums of all warps that share keys, in the first of them.
template <int kWarpsOverRows, int kBlocks>
__device__ __forceinline__ void add_up(Sums<1, kBlocks>& sums, float* scratch, int warp_row) {
  const int lane = threadIdx.x % 32;
  for (int w = 1; w < kWarpsOverRows; ++w) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kBlocks * 4; ++i) {
      if (warp_row == w) scratch[i * 32 + lane] = sums.c[0][i / 4][i % 4];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kBlocks * 4; ++i) {
      if (warp_row == 0) sums.c[0][i / 4][i % 4] += scratch[i * 32 + lane];
    }
  }
}

// Blocks: units, or parts of sequences, times heads times slices of head dimensions.
template <class T, int kDim, int kKeys>
__global__ void __launch_bounds__(KeyShape<T, kDim, kKeys>::kThreads, 1)
    find_dkv(const BackwardParams params) {
  using S = KeyShape<T, kDim, kKeys>;
  using Rows = RowTiles<T, kDim, kKeys>;
  const AttentionParams& p = params.a;
  const int tid = threadIdx.x, lane = tid % 32;
  const int warp_row = tid / 32 % S::kWarpsOverRows;
  const int warp_key = tid / 32 / S::kWarpsOverRows * 16;

  // Keys [kKeys][D], values [kKeys][Dv], tiles of rows, what they see.
  char* const memory = shared_memory();
  const Tile keys{memory, pitch_of(p.dim * sizeof(T))};
  const Tile values{memory + kKeys * keys.pitch, pitch_of(p.dim_v * sizeof(T))};
  char* const tile_memory = values.data + kKeys * values.pitch;
  const int tile_bytes = Rows::kStages * Rows::tile_bytes(p);
  SeeingRow* const rows = reinterpret_cast<SeeingRow*>(tile_memory + tile_bytes);

  const int slices = ((p.dim > p.dim_v ? p.dim : p.dim_v) + kSlice - 1) / kSlice;
  const int slice = static_cast<int>(blockIdx.x % slices);
  const int head = static_cast<int>(blockIdx.x / slices % p.num_kv_heads);
  int64_t owner = blockIdx.x / slices / p.num_kv_heads;

  // The block's keys: how many, the first of its unit or sequence, and where they lie.
  int first, count;
  int64_t outer = 0, token;
  if (params.runs) {
    first = static_cast<int>(owner % params.parts_of_unit) * kKeys;
    owner /= params.parts_of_unit;
    count = params.unit - first;
    outer = owner * params.unit / p.page_size;
    token = owner * params.unit % p.page_size + first;
  } else {
    int64_t b = owner / params.parts_of_unit;
    first = static_cast<int>(owner % params.parts_of_unit) * kKeys;
    if (p.cu_seqlens_k.data) {
      const auto first_owner = [&](int64_t i) { return extent_of(p, i).first_token / kKeys + i; };
      b = last_at_most(p.num_sequences, owner, first_owner);
      first = static_cast<int>(clamp(owner - first_owner(b), 0, kNoLimit / kKeys - 1)) * kKeys;
    } else {
      outer = b;
    }
    const Extent extent = extent_of(p, b);
    count = extent.length - first;
    token = extent.first_token + first;
    owner = b;
  }
  if (count <= 0) return;
  if (count > kKeys) count = kKeys;

  Rows tiles(params, head, owner, first, tile_memory, rows);
  if (tiles.empty()) return;
  const int steps = (p.dim * static_cast<int>(sizeof(T)) + 31) / 32;
  const int v_steps = (p.dim_v * static_cast<int>(sizeof(T)) + 31) / 32;
  if (p.dim * sizeof(T) % 32 != 0 || p.dim_v * sizeof(T) % 32 != 0) {
    fill_zeros<S::kThreads>(memory, kKeys * (keys.pitch + values.pitch) + tile_bytes);
    __syncthreads();
  }
  const auto load = [&](const Tile& tile, const CacheRows& from, int dim) {
    const T* const data =
        static_cast<const T*>(from.data) + outer * from.outer_stride + head * from.head_stride;
    for (int i = tid / S::kLanes; i < kKeys; i += S::kThreads / S::kLanes) {
      const bool used = i < count;
      copy_row<T, S::kLanes>(tile, i, data + (token + (used ? i : 0)) * from.token_stride, dim,
                             tid % S::kLanes, p.aligned, used);
    }
  };
  load(keys, p.k, p.dim);
  load(values, p.v, p.dim_v);
  tiles.start();

  float bias[2] = {}, dbias[2] = {};
  for (int half = 0; p.key_bias.data && half < 2; ++half) {
    const int key = warp_key + lane / 4 + 8 * half;
    if (key >= count) continue;
    const int64_t offset = outer * p.key_bias.outer_stride +
                           (token + key) * p.key_bias.token_stride + head * p.key_bias.head_stride;
    bias[half] = to_base_2(companion_at<T>(p.key_bias.data, p.bias_is_float, offset));
  }

  Sums<1, S::kColumnBlocks> dk, dv;
  dk.clear();
  dv.clear();
  const int first_block = slice * kSlice / 8;
  for (; tiles.more(); tiles.finish()) {
    wait_copies<0>();
    __syncthreads();
    tiles.advance();
    const Tile q = tiles.queries(), dout = tiles.douts();
    const int first_row = warp_row * S::kRowBlocks * 8;
    Sums<1, S::kRowBlocks> x, y;
    x.clear();
    y.clear();
    multiply_rows<T>(x, keys, warp_key, q, first_row, steps);
    multiply_rows<T>(y, values, warp_key, dout, first_row, v_steps);
#pragma unroll
    for (int block = 0; block < S::kRowBlocks; ++block) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const SeeingRow row = tiles.row(first_row + 8 * block + lane % 4 * 2 + e);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int key = warp_key + lane / 4 + 8 * half;
          const bool seen = row.query >= 0 && key < count && key < row.high &&
                            (key >= row.low || key < row.sinks) && bias[half] != -kInfinity;
          float& product = x.c[0][block][2 * half + e];
          float& dweight = y.c[0][block][2 * half + e];
          float slope;
          const float logit = finish_logit(p, product, bias[half], &slope);
          const float weight = seen ? exp2_fast(logit - row.lse) : 0.f;
          const float dlogit = seen ? weight * (dweight - row.delta) : 0.f;
          dbias[half] += dlogit;
          product = seen ? dlogit * slope : 0.f;  // the slope of a hidden key may be NaN
          dweight = weight;
        }
      }
    }
    multiply_columns<T>(dv, y, dout, first_row, first_block, p.dim_v);
    multiply_columns<T>(dk, x, q, first_row, first_block, p.dim);
  }

  float* const scratch = reinterpret_cast<float*>(tile_memory);
  add_up<S::kWarpsOverRows>(dk, scratch, warp_row);
  add_up<S::kWarpsOverRows>(dv, scratch, warp_row);
  Sums<1, 1> dbiases{{{{dbias[0], dbias[1], 0.f, 0.f}}}};
  add_up<S::kWarpsOverRows>(dbiases, scratch, warp_row);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = dbiases.c[0][0][half];
    sum += __shfl_xor_sync(kWholeWarp, sum, 1);
    sum += __shfl_xor_sync(kWholeWarp, sum, 2);
    const int key = warp_key + lane / 4 + 8 * half;
    if (warp_row > 0 || key >= count) continue;
    const int64_t to = (outer * p.page_size + token + key) * p.num_kv_heads + head;
    if (params.dk) {
      store_row(static_cast<T*>(params.dk) + to * p.dim, dk.c[0], half, p.scale, 8 * first_block,
                p.dim);
    }
    if (params.dv) {
      store_row(static_cast<T*>(params.dv) + to * p.dim_v, dv.c[0], half, 1.f, 8 * first_block,
                p.dim_v);
    }
    if (!params.dkey_bias || slice > 0 || lane % 4 > 0) continue;
    if (p.bias_is_float) {
      static_cast<float*>(params.dkey_bias)[to] = sum;
    } else {
      narrow(sum, static_cast<T*>(params.dkey_bias)[to]);
    }
  }
}

}  // namespace memkernels::attention::cuda
