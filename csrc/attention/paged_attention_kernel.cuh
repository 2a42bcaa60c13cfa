// Attention over an indexed stream of keys, and the merge of its splits.
//
//   logit = scale q.k, soft-capped, plus key_bias;  out = softmax(logit) v;  lse = log sum exp
//
// A block owns kRows rows, queries times heads of one KV head, and one split of their keys, which
// it reads once for all of them. Tiles of keys and values travel to shared memory by cp.async, a
// few tiles ahead; the places of their tokens (page tables, lists) are looked up another tile
// earlier, so that page size and order do not matter. Scores and values are multiplied on tensor
// cores: warps share the keys of the scores, then the columns of the values.
//
// Cost: (D + Dv) elements of memory and 2 (D + Dv) kRows flops a key and KV head. In decoding with
// groups of 4 in 16-bit that is 8 flops a byte used of 32 issued; an H200 has some 200 (4.8 TB/s,
// dense 990 Tflop/s), so memory is the limit: 85 % of its copy bandwidth is expected, some 75 %
// where rows of 256 bytes lie apart. Multi-head latent attention (128 heads on one) issues 240
// flops a byte and is bound by mma.sync, at about 60 % of the tensor cores' peak.
#pragma once

#include "attention/paged_attention_cuda.h"
#include "core/cuda/device.cuh"

namespace memkernels::attention::cuda {

using namespace memkernels::cuda;

inline constexpr float kLog2e = 1.44269504088896340736f;
inline constexpr float kLn2 = 0.69314718055994530942f;

template <class T, int kDim, int kRows>
struct Shape {
  static constexpr int kWarpsOverRows = kRows / 16;
  static constexpr int kWarpsOverKeys = kRows == 16 ? 4 : 2;  // and over columns of the values
  static constexpr int kThreads = 32 * kWarpsOverRows * kWarpsOverKeys;
  static constexpr int kKeys = keys_of_tile(sizeof(T), kDim);
  static constexpr int kKeyBlocks = (kKeys / 8 + kWarpsOverKeys - 1) / kWarpsOverKeys;
  static constexpr int kColumnBlocks = (kDim / 8 + kWarpsOverKeys - 1) / kWarpsOverKeys;
  static constexpr int kScorePitch = kKeys + 8;
  static constexpr int kDepth = 32 / sizeof(T);  // keys of one multiplication with values
  static constexpr int kPack = 4 / sizeof(T);    // elements of a register
  static constexpr int kChunk = 16 / sizeof(T);  // elements of a copy
  static constexpr int kLanesOfRow = kDim / kChunk < 32 ? kDim / kChunk : 32;
};

__device__ __forceinline__ int64_t clamp(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

// A float32 beside tensors of type T, or one of them.
template <class T>
__device__ __forceinline__ float companion_at(const void* data, bool is_float, int64_t offset) {
  return is_float ? static_cast<const float*>(data)[offset]
                  : widen(static_cast<const T*>(data)[offset]);
}

// Where a key lies, and what is added to its logits; hidden keys have position -1.
struct alignas(16) Key {
  int outer, token;
  int position;
  float bias;  // in units of log2
};

// The rows of a block and the stream of keys they see: [0, sinks) and [begin, end) of its split.
struct Stream {
  int64_t partial;          // of the first query, among those that may be split
  int64_t row;              // of the page table, or of contiguous K and V
  int64_t first_token;      // of packed K and V
  int64_t list;             // offset of the list of indices
  int query, num_queries;   // first row of q, and how many share the stream
  int first_position;       // of that query
  int first_row;            // of the block, among the num_queries * group of the stream
  int visible;              // tokens that any row of the block sees
  int sinks, window_begin;  // tokens between them no row sees
  int window;
  int begin, end;  // of the split
  bool may_split;
  int num_splits;
};

__device__ __forceinline__ int split_length(int keys) {
  int length = 256;
  while (length * 32 < keys) length *= 2;
  return length;
}

// First row of the queries of sequence b.
__device__ __forceinline__ int first_query(const AttentionParams& p, int64_t b) {
  return p.cu_seqlens_q.data ? static_cast<int>(clamp(at(p.cu_seqlens_q, b), 0, p.total_q))
                             : static_cast<int>(b);
}

// The largest b in [0, num_sequences) whose value(b) <= x; value rises.
template <class Value>
__device__ __forceinline__ int64_t last_at_most(int64_t num_sequences, int64_t x,
                                                const Value& value) {
  int64_t b = 0, past = num_sequences;
  while (past - b > 1) {
    const int64_t middle = (b + past) / 2;
    (value(middle) <= x ? b : past) = middle;
  }
  return b;
}

// The greatest x of the block, of those that are not negative.
template <int kThreads>
__device__ __forceinline__ int block_max(int x, int* scratch) {
  x = warp_max(x);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0;
  for (int w = 0; w < kThreads / 32; ++w) x = scratch[w] > x ? scratch[w] : x;
  __syncthreads();
  return x;
}

// How far the list of a query goes: up to the last key it sees.
template <int kThreads>
__device__ __forceinline__ int stream_length(const AttentionParams& p, int64_t list, int visible,
                                             int* scratch) {
  for (int past = p.list_length; past > 0; past -= kThreads) {
    const int i = past - 1 - static_cast<int>(threadIdx.x);
    int length = 0;
    if (i >= 0) {
      const int64_t index = integer_at(p.indices, list + i * p.indices.stride);
      const int64_t first = index * p.unit;
      if (index >= 0 && index < visible && first < visible) {
        const int tokens = visible - static_cast<int>(first);
        length = i * p.unit + (tokens < p.unit ? tokens : p.unit);
      }
    }
    length = block_max<kThreads>(length, scratch);
    if (length > 0) return length;
  }
  return 0;
}

// Fills in `s`; false where the block has nothing to do. `slot` counts blocks of rows, of all
// sequences.
template <int kRows, int kThreads>
__device__ __forceinline__ bool find_stream(const AttentionParams& p, int64_t slot, int split,
                                            int head, int* scratch, Stream& s) {
  const int group = p.group;
  int64_t b;
  int num_queries, skipped = 0;  // of the sequence: all, and those before s.query
  if (p.blocks_of_query > 0) {
    b = slot / p.blocks_of_query;
    s.first_row = static_cast<int>(slot % p.blocks_of_query) * kRows;
    s.query = static_cast<int>(b);
    num_queries = s.num_queries = 1;
    if (p.cu_seqlens_q.data) {
      b = last_at_most(p.num_sequences, b, [&](int64_t i) { return first_query(p, i); });
      skipped = s.query - first_query(p, b);
      num_queries = first_query(p, b + 1) - first_query(p, b);
      if (skipped < 0 || skipped >= num_queries) return false;
    }
  } else {
    const auto first_slot = [&](int64_t i) {
      return static_cast<int64_t>(first_query(p, i)) * group / kRows + i;
    };
    b = last_at_most(p.num_sequences, slot, first_slot);
    s.query = first_query(p, b);
    num_queries = s.num_queries = first_query(p, b + 1) - s.query;
    s.first_row = static_cast<int>(slot - first_slot(b)) * kRows;
    if (s.first_row < 0 || s.first_row >= num_queries * group) return false;
  }

  s.row = b;
  s.partial = b * p.partial_queries + skipped;
  s.first_token = 0;
  int64_t tokens = p.capacity;
  if (p.cu_seqlens_k.data) {
    s.first_token = clamp(at(p.cu_seqlens_k, b), 0, p.capacity);
    tokens = clamp(at(p.cu_seqlens_k, b + 1), s.first_token, p.capacity) - s.first_token;
  } else if (p.seq_lens.data) {
    tokens = at(p.seq_lens, b);
  }
  const int length = static_cast<int>(clamp(tokens, 0, p.max_length));

  s.first_position = length - num_queries + skipped;
  const int last_row = s.first_row + kRows - 1;
  const int last_query = last_row / group < s.num_queries ? last_row / group : s.num_queries - 1;
  s.visible =
      p.causal ? static_cast<int>(clamp(s.first_position + last_query + 1, 0, length)) : length;
  s.window =
      p.head_window.data ? static_cast<int>(clamp(at(p.head_window, head), 0, kNoLimit)) : p.window;
  const int64_t seen_from = int64_t{s.first_position} + s.first_row / group - s.window + 1;
  s.window_begin = static_cast<int>(clamp(seen_from, 0, s.visible));
  s.sinks = p.sink_tokens < s.window_begin ? p.sink_tokens : s.window_begin;

  int keys = length, end = s.visible;
  if (p.listed) {
    s.list = s.query * p.list_query_stride + head * p.list_head_stride;
    keys = end = stream_length<kThreads>(p, s.list, s.visible, scratch);
  }
  s.may_split = p.splits > 1 && num_queries <= p.partial_queries;
  const int step = s.may_split ? split_length(keys) : keys;
  s.num_splits = keys > step ? (keys + step - 1) / step : 1;
  const int tid = threadIdx.x, owner = s.first_row / group + tid;
  if (s.may_split && split == 0 && tid <= last_row / group && owner < s.num_queries) {
    p.num_splits[(s.partial + owner) * p.num_kv_heads + head] = s.num_splits;
  }
  if (split >= s.num_splits) return false;
  s.begin = split * step;
  s.end = s.begin + step < end ? s.begin + step : end;
  return true;
}

// What the list says of key j of the stream, read ahead of find_key.
__device__ __forceinline__ int64_t list_entry(const AttentionParams& p, const Stream& s, int j) {
  if (!p.listed || j >= s.end) return -1;
  return integer_at(p.indices, s.list + j / p.unit * p.indices.stride);
}

template <class T>
__device__ __forceinline__ Key find_key(const AttentionParams& p, const Stream& s, int head, int j,
                                        int64_t entry) {
  Key key{0, 0, -1, 0.f};
  if (j >= s.end) return key;
  int64_t token = j;
  if (p.listed) {
    if (entry < 0 || entry >= s.visible) return key;
    token = entry * p.unit + j % p.unit;
  } else if (j >= s.sinks && j < s.window_begin) {
    return key;
  }
  if (token >= s.visible) return key;
  const int position = static_cast<int>(token);
  if (p.page_table.data) {
    const int64_t page = integer_at(
        p.page_table, s.row * p.table_row_stride + position / p.page_size * p.page_table.stride);
    if (page < 0 || page >= p.num_pages) return key;
    key.outer = static_cast<int>(page);
    key.token = position % p.page_size;
  } else {
    key.outer = static_cast<int>(p.cu_seqlens_k.data ? 0 : s.row);
    key.token = static_cast<int>(s.first_token + position);
  }
  if (p.key_bias.data) {
    const int64_t offset = key.outer * p.key_bias.outer_stride +
                           key.token * p.key_bias.token_stride + head * p.key_bias.head_stride;
    key.bias = companion_at<T>(p.key_bias.data, p.bias_is_float, offset) * kLog2e;
    if (key.bias == -kInfinity) return key;
  }
  key.position = position;
  return key;
}

// Bytes from row to row, for rows of that many.
__device__ __forceinline__ int pitch_of(size_t row_bytes) {
  return static_cast<int>(row_bytes + 127) & ~127;
}

// Rows of shared memory, whose 16-byte chunks are permuted so that eight rows of one column lie in
// different banks.
struct Tile {
  char* data;
  int pitch;  // bytes, a multiple of 128

  __device__ __forceinline__ char* chunk(int row, int column) const {
    return data + row * pitch + ((column ^ (row & 7)) << 4);
  }
  template <class T>
  __device__ __forceinline__ T* element(int row, int column) const {
    constexpr int kChunk = 16 / sizeof(T);
    return reinterpret_cast<T*>(chunk(row, column / kChunk)) + column % kChunk;
  }
};

// Starts copying a row, by kLanesOfRow neighbouring threads; or fills it with zeros.
template <class T, class S>
__device__ __forceinline__ void copy_row(const Tile& tile, int i, const T* row, int dim,
                                         bool aligned, bool used) {
  const int lane = threadIdx.x % S::kLanesOfRow;
  if (aligned) {
    for (int c = lane; c < dim / S::kChunk; c += S::kLanesOfRow) {
      copy_async_16(tile.chunk(i, c), row + c * S::kChunk, used ? 16 : 0);
    }
  } else {
    for (int c = lane; c < dim; c += S::kLanesOfRow) *tile.element<T>(i, c) = used ? row[c] : T{};
  }
}

// The rows of a tile of keys; hidden ones become zeros, or stay what they are.
template <class T, class S>
__device__ __forceinline__ void load_rows(const Tile& tile, const Key* keys, const CacheRows& rows,
                                          int head, int dim, bool aligned, bool zero_hidden) {
  for (int i = threadIdx.x / S::kLanesOfRow; i < S::kKeys; i += S::kThreads / S::kLanesOfRow) {
    const Key key = keys[i];
    const bool used = key.position >= 0;
    if (!used && !zero_hidden) continue;
    const T* row = static_cast<const T*>(rows.data) + key.outer * rows.outer_stride +
                   key.token * rows.token_stride + head * rows.head_stride;
    copy_row<T, S>(tile, i, row, dim, aligned, used);
  }
}

__device__ __forceinline__ void multiply_add(bf16, float (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  multiply_bf16(c, a, b);
}
__device__ __forceinline__ void multiply_add(f16, float (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  multiply_f16(c, a, b);
}

// x = high + low to some 22 bits, each a tf32; finite is high, or 0 where x is infinite.
struct Halves {
  uint32_t high, low, finite;
};
__device__ __forceinline__ Halves halve(uint32_t x) {
  const uint32_t high = round_tf32(bits_to_float(x));
  const float rest = bits_to_float(x) - bits_to_float(high);
  const bool infinite = fabsf(bits_to_float(high)) == kInfinity;
  return {high, infinite ? 0 : round_tf32(rest), infinite ? 0 : high};
}

// float32 as three products of tf32; what is dropped is below its rounding. An infinite element
// meets only high parts, which are zero where the other element is.
__device__ __forceinline__ void multiply_add(float, float (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  uint32_t a_high[4], a_low[4], a_finite[4], b_high[2], b_low[2], b_finite[2];
  for (int i = 0; i < 4; ++i) {
    const Halves x = halve(a[i]);
    a_high[i] = x.high, a_low[i] = x.low, a_finite[i] = x.finite;
  }
  for (int i = 0; i < 2; ++i) {
    const Halves x = halve(b[i]);
    b_high[i] = x.high, b_low[i] = x.low, b_finite[i] = x.finite;
  }
  multiply_tf32(c, a_low, b_finite);
  multiply_tf32(c, a_finite, b_low);
  multiply_tf32(c, a_high, b_high);
}

// Values of the tile at keys [first, first + kDepth) and columns [8 block, 8 block + 8).
template <class T>
__device__ __forceinline__ void load_values(T, uint32_t (&b)[2], const Tile& v, int first,
                                            int block) {
  load_matrices_2_transposed(b, v.chunk(first + threadIdx.x % 16, block));
}
__device__ __forceinline__ void load_values(float, uint32_t (&b)[2], const Tile& v, int first,
                                            int block) {
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 2; ++i) {
    b[i] = *v.element<uint32_t>(first + lane % 4 + 4 * i, 8 * block + lane / 4);
  }
}

template <class T>
__device__ __forceinline__ uint32_t pack_pair(T, const float (&x)[2]) {
  return pack(T(), x[0], x[1]);
}
__device__ __forceinline__ uint32_t pack_pair(float, const float (&x)[1]) {
  return float_to_bits(x[0]);
}

// A thread's columns of one of its rows.
template <class S, class T, int kBlocks>
__device__ __forceinline__ void store_row(T* out, const float (&accumulator)[kBlocks][4], int half,
                                          float factor, int warp_column, int dim) {
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
    const int column =
        8 * (i * S::kWarpsOverKeys + warp_column) + static_cast<int>(threadIdx.x) % 4 * 2;
    const float x = accumulator[i][2 * half] * factor;
    const float y = accumulator[i][2 * half + 1] * factor;
    if (column + 1 < dim && dim % 2 == 0) {
      store_pair(out + column, x, y);
    } else {
      if (column < dim) narrow(x, out[column]);
      if (column + 1 < dim) narrow(y, out[column + 1]);
    }
  }
}

// Two rows of a thread: lane / 4 and 8 further, of the 16 of its warp.
struct RowState {
  float maximum[2] = {-kInfinity, -kInfinity};  // of the logits, base 2
  float sum[2] = {0.f, 0.f};                    // of the thread's own columns
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

template <class T, int kDim, int kRows>
__global__ void __launch_bounds__(Shape<T, kDim, kRows>::kThreads, 1)
    attend(const AttentionParams p) {
  using S = Shape<T, kDim, kRows>;
  constexpr int kKeys = S::kKeys, kDepth = S::kDepth, kPack = S::kPack;
  const int tid = threadIdx.x, lane = tid % 32;
  const int warp_row = tid / 32 / S::kWarpsOverKeys * 16,
            warp_column = tid / 32 % S::kWarpsOverKeys;

  // q [kRows][D], stages of keys [kKeys][D] and values [kKeys][Dv], scores [kRows][kKeys + 8],
  // stages of places [kKeys].
  const int k_pitch = pitch_of(p.dim * sizeof(T)), v_pitch = pitch_of(p.dim_v * sizeof(T));
  char* const memory = shared_memory();
  const Tile q{memory, k_pitch};
  char* const tiles = memory + kRows * k_pitch;
  const int stage_bytes = kKeys * (k_pitch + (p.v_within_k ? 0 : v_pitch));
  float* const scores = reinterpret_cast<float*>(tiles + p.stages * stage_bytes);
  Key* const places = reinterpret_cast<Key*>(scores + kRows * S::kScorePitch);
  const auto keys_in = [&](int stage) { return Tile{tiles + stage * stage_bytes, k_pitch}; };
  const auto values_in = [&](int stage) {
    if (p.v_within_k) return keys_in(stage);
    return Tile{tiles + stage * stage_bytes + kKeys * k_pitch, v_pitch};
  };

  const int head = static_cast<int>(blockIdx.x % p.num_kv_heads);
  const int split = static_cast<int>(blockIdx.x / p.num_kv_heads % p.splits);
  const int64_t slot = blockIdx.x / p.num_kv_heads / p.splits;
  Stream s;
  if (!find_stream<kRows, S::kThreads>(p, slot, split, head, reinterpret_cast<int*>(scores), s)) {
    return;
  }

  // What lies behind the head dimension takes part in the scores' products.
  const int steps = (p.dim * static_cast<int>(sizeof(T)) + 31) / 32;
  if (p.dim * sizeof(T) % 32 != 0) {
    const int words = (kRows * k_pitch + p.stages * stage_bytes) / 4;
    for (int i = tid; i < words; i += S::kThreads) reinterpret_cast<uint32_t*>(memory)[i] = 0;
    __syncthreads();
  }
  for (int r = tid / S::kLanesOfRow; r < kRows; r += S::kThreads / S::kLanesOfRow) {
    const int row = s.first_row + r, query = row / p.group;
    const bool used = query < s.num_queries;
    const T* from = static_cast<const T*>(p.q) + (s.query + int64_t{query}) * p.q_stride +
                    (head * p.group + row % p.group) * p.q_head_stride;
    copy_row<T, S>(q, r, from, p.dim, p.aligned, used);
  }

  // Three cursors walk over the tiles that any row sees: looked up, loaded, worked on.
  const auto next = [&](int tile) {
    ++tile;
    const bool skip = tile * kKeys >= s.sinks && (tile + 1) * kKeys <= s.window_begin;
    return skip && !p.listed ? s.window_begin / kKeys : tile;
  };
  const int last_tile = (s.end + kKeys - 1) / kKeys;  // behind the last
  const int first_tile = next(s.begin / kKeys - 1);
  const auto look_up = [&](int tile, int64_t entry) {
    return find_key<T>(p, s, head, tile * kKeys + tid, entry);
  };
  int found = first_tile;
  for (int stage = 0; stage < p.stages; ++stage, found = next(found)) {
    if (tid < kKeys) {
      places[stage * kKeys + tid] = look_up(found, list_entry(p, s, found * kKeys + tid));
    }
  }
  int64_t entry = tid < kKeys ? list_entry(p, s, found * kKeys + tid) : -1;
  __syncthreads();
  int loaded = first_tile;
  const auto load = [&](int stage) {
    if (loaded < last_tile) {
      const Key* keys = places + stage * kKeys;
      load_rows<T, S>(keys_in(stage), keys, p.k, head, p.dim, p.aligned, p.v_within_k);
      if (!p.v_within_k) {
        load_rows<T, S>(values_in(stage), keys, p.v, head, p.dim_v, p.aligned, true);
      }
      loaded = next(loaded);
    }
    commit_copies();
  };
  for (int stage = 0; stage + 1 < p.stages; ++stage) load(stage);

  float accumulator[S::kColumnBlocks][4];
  for (auto& block : accumulator) {
    for (float& x : block) x = 0.f;
  }
  RowState state;
  int position[2];
  for (int i = 0; i < 2; ++i) {
    position[i] = s.first_position + (s.first_row + warp_row + lane / 4 + 8 * i) / p.group;
  }

  int stage = 0;
  for (int tile = first_tile; tile < last_tile; tile = next(tile)) {
    if (p.stages == 2) {
      wait_copies<0>();
    } else if (p.stages == 3) {
      wait_copies<1>();
    } else {
      wait_copies<2>();
    }
    __syncthreads();  // the tile is there, and the stage before it is free
    load(stage == 0 ? p.stages - 1 : stage - 1);
    Key place{};
    if (tid < kKeys) {
      place = look_up(found, entry);
      found = next(found);
      entry = list_entry(p, s, found * kKeys + tid);
    }

    // Scores of 16 rows and the warp's keys.
    float logits[S::kKeyBlocks][4];
    for (auto& block : logits) {
      for (float& x : block) x = 0.f;
    }
    const Tile keys = keys_in(stage);
    for (int step = 0; step < steps; ++step) {
      uint32_t a[4];
      load_matrices_4(a, q.chunk(warp_row + lane % 16, 2 * step + lane / 16));
#pragma unroll
      for (int i = 0; i < S::kKeyBlocks; ++i) {
        const int block = i * S::kWarpsOverKeys + warp_column;
        if (8 * block >= kKeys) break;
        uint32_t b[2];
        load_matrices_2(b, keys.chunk(8 * block + lane % 8, 2 * step + lane / 8 % 2));
        multiply_add(T(), logits[i], a, b);
      }
    }
#pragma unroll
    for (int i = 0; i < S::kKeyBlocks; ++i) {
      const int block = i * S::kWarpsOverKeys + warp_column;
      if (8 * block >= kKeys) break;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int column = 8 * block + lane % 4 * 2 + e % 2;
        const Key key = places[stage * kKeys + column];
        const int distance = position[e / 2] - key.position;
        const bool seen = key.position >= 0 && (!p.causal || distance >= 0) &&
                          (distance < s.window || key.position < p.sink_tokens);
        float x = logits[i][e] * p.scale;
        x = p.softcap > 0 ? p.softcap * tanhf(x / p.softcap) : x;
        scores[(warp_row + lane / 4 + e / 2 * 8) * S::kScorePitch + column] =
            seen ? x * kLog2e + key.bias : -kInfinity;
      }
    }
    __syncthreads();  // all scores are there, and no place of the tile is needed any more
    if (tid < kKeys) places[stage * kKeys + tid] = place;

    // Softmax, by every warp for its 16 rows.
    float weights[kKeys / kDepth][4][kPack];
#pragma unroll
    for (int step = 0; step < kKeys / kDepth; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int e = 0; e < kPack; ++e) {
          const int row = warp_row + lane / 4 + i % 2 * 8;
          const int column = step * kDepth + i / 2 * kDepth / 2 + lane % 4 * kPack + e;
          weights[step][i][e] = scores[row * S::kScorePitch + column];
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = state.maximum[half];
#pragma unroll
      for (int step = 0; step < kKeys / kDepth; ++step) {
#pragma unroll
        for (int i = half; i < 4; i += 2) {
#pragma unroll
          for (int e = 0; e < kPack; ++e) most = fmaxf(most, weights[step][i][e]);
        }
      }
      most = fmaxf(most, __shfl_xor_sync(kWholeWarp, most, 1));
      most = fmaxf(most, __shfl_xor_sync(kWholeWarp, most, 2));
      const float base = most == -kInfinity ? 0.f : most;
      const float kept = exp2_fast(state.maximum[half] - base);
      state.maximum[half] = most;
      float sum = 0.f;
#pragma unroll
      for (int step = 0; step < kKeys / kDepth; ++step) {
#pragma unroll
        for (int i = half; i < 4; i += 2) {
#pragma unroll
          for (int e = 0; e < kPack; ++e) {
            weights[step][i][e] = exp2_fast(weights[step][i][e] - base);
            sum += weights[step][i][e];
          }
        }
      }
      state.sum[half] = state.sum[half] * kept + sum;
#pragma unroll
      for (int i = 0; i < S::kColumnBlocks; ++i) {
        accumulator[i][2 * half] *= kept;
        accumulator[i][2 * half + 1] *= kept;
      }
    }

    const Tile values = values_in(stage);
#pragma unroll
    for (int step = 0; step < kKeys / kDepth; ++step) {
      uint32_t a[4];
      for (int i = 0; i < 4; ++i) a[i] = pack_pair(T(), weights[step][i]);
#pragma unroll
      for (int i = 0; i < S::kColumnBlocks; ++i) {
        const int block = i * S::kWarpsOverKeys + warp_column;
        if (8 * block >= p.dim_v) break;
        uint32_t b[2];
        load_values(T(), b, values, step * kDepth, block);
        multiply_add(T(), accumulator[i], a, b);
      }
    }
    stage = stage + 1 == p.stages ? 0 : stage + 1;
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = state.sum[half];
    sum += __shfl_xor_sync(kWholeWarp, sum, 1);
    sum += __shfl_xor_sync(kWholeWarp, sum, 2);
    const int row = s.first_row + warp_row + lane / 4 + 8 * half, query = row / p.group;
    if (query >= s.num_queries) continue;
    const int q_head = head * p.group + row % p.group;
    const bool leader = warp_column == 0 && lane % 4 == 0;
    if (s.may_split) {
      const int64_t partial = ((s.partial + query) * p.num_heads + q_head) * p.splits + split;
      if (leader) p.partial_states[partial] = {state.maximum[half], sum};
      store_row<S>(p.partial_out + partial * p.dim_v, accumulator, half, 1.f, warp_column, p.dim_v);
    } else {
      const Outcome outcome =
          finish_row(state.maximum[half], sum, p.sink_logit != nullptr, sink_of<T>(p, q_head));
      const int64_t to = (s.query + int64_t{query}) * p.num_heads + q_head;
      if (leader) p.lse[to] = outcome.lse;
      store_row<S>(static_cast<T*>(p.out) + to * p.dim_v, accumulator, half, outcome.factor,
                   warp_column, p.dim_v);
    }
  }
}

// Merges the splits of a row, in their order; a warp a row.
template <class T>
__global__ void __launch_bounds__(128) merge_splits(const AttentionParams p, int64_t num_rows) {
  const int64_t row = blockIdx.x * 4ll + threadIdx.x / 32;
  if (row >= num_rows) return;
  const int lane = threadIdx.x % 32, head = static_cast<int>(row % p.num_heads);
  const int64_t owner = row / p.num_heads, b = owner / p.partial_queries;
  const int query = static_cast<int>(owner % p.partial_queries), first = first_query(p, b);
  const int queries = p.cu_seqlens_q.data ? first_query(p, b + 1) - first : 1;
  if (query >= queries || queries > p.partial_queries) return;
  const int n = p.num_splits[owner * p.num_kv_heads + head / p.group];
  const PartialState* const states = p.partial_states + row * p.splits;
  const float* const outs = p.partial_out + row * p.splits * p.dim_v;

  float most = -kInfinity;
  for (int i = 0; i < n; ++i) most = fmaxf(most, states[i].maximum);
  const float base = most == -kInfinity ? 0.f : most;
  float sum = 0.f;
  for (int i = 0; i < n; ++i) sum += exp2f(states[i].maximum - base) * states[i].sum;
  const Outcome outcome = finish_row(most, sum, p.sink_logit != nullptr, sink_of<T>(p, head));

  const int64_t to = (int64_t{first} + query) * p.num_heads + head;
  if (lane == 0) p.lse[to] = outcome.lse;
  T* const out = static_cast<T*>(p.out) + to * p.dim_v;
  for (int c = lane; c < p.dim_v; c += 32) {
    float x = 0.f;
#pragma unroll 4
    for (int i = 0; i < n; ++i) {
      x += exp2f(states[i].maximum - base) * outs[int64_t{i} * p.dim_v + c];
    }
    narrow(x * outcome.factor, out[c]);
  }
}

}  // namespace memkernels::attention::cuda
