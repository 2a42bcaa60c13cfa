// The stream of keys that a block of rows sees, and its tiles in shared memory.
//
// Tiles of keys and values travel by cp.async, a few ahead of the one worked on; the places of
// their tokens (page tables, lists) are looked up two tiles earlier still, so that page size and
// order do not matter.
#pragma once

#include "attention/paged_attention_cuda.h"
#include "core/cuda/tile.cuh"

namespace memkernels::attention::cuda {

using namespace memkernels::cuda;

inline constexpr float kLog2e = 1.44269504088896340736f;
inline constexpr float kLn2 = 0.69314718055994530942f;

// A bias in units of log2; finite ones stay finite, since -inf hides a key.
__device__ __forceinline__ float to_base_2(float bias) {
  const float x = bias * kLog2e;
  return x == -kInfinity && bias != -kInfinity ? -kGreatest : x;
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
  int num_splits, split_length, stream_end;
  int begin, end;  // of the split
};

__device__ __forceinline__ int split_length(int keys) {
  int length = 256;
  while (int64_t{length} * kMaxSplits < keys) length *= 2;
  return length;
}

// First row of the queries of sequence b.
__device__ __forceinline__ int first_query(const AttentionParams& p, int64_t b) {
  return p.cu_seqlens_q.data ? static_cast<int>(clamp(at(p.cu_seqlens_q, b), 0, p.total_q))
                             : static_cast<int>(b);
}

// The keys of sequence b: where they begin in packed K and V, and how many there are.
struct Extent {
  int64_t first_token;
  int length;
};
__device__ __forceinline__ Extent extent_of(const AttentionParams& p, int64_t b) {
  int64_t first = 0, length = p.capacity;
  if (p.cu_seqlens_k.data) {
    first = clamp(at(p.cu_seqlens_k, b), 0, p.capacity);
    length = clamp(at(p.cu_seqlens_k, b + 1), first, p.capacity) - first;
  } else if (p.seq_lens.data) {
    length = at(p.seq_lens, b);
  }
  return {first, static_cast<int>(clamp(length, 0, p.max_length))};
}

// How many keys back a query of a head sees.
__device__ __forceinline__ int window_of(const AttentionParams& p, int head) {
  return p.head_window.data ? static_cast<int>(clamp(at(p.head_window, head), 0, kNoLimit))
                            : p.window;
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
  s.partial = p.partial_by_query ? s.query : b * p.partial_queries + skipped;
  const Extent extent = extent_of(p, b);
  s.first_token = extent.first_token;
  const int length = extent.length;

  s.first_position = length - num_queries + skipped;
  const int last_row = s.first_row + kRows - 1;
  const int last_query = last_row / group < s.num_queries ? last_row / group : s.num_queries - 1;
  s.visible =
      p.causal ? static_cast<int>(clamp(s.first_position + last_query + 1, 0, length)) : length;
  s.window = window_of(p, head);
  const int64_t seen_from = int64_t{s.first_position} + s.first_row / group - s.window + 1;
  s.window_begin = static_cast<int>(clamp(seen_from, 0, s.visible));
  s.sinks = p.sink_tokens < s.window_begin ? p.sink_tokens : s.window_begin;

  int keys = length, end = s.visible;
  if (p.listed) {
    s.list = s.query * p.list_query_stride + head * p.list_head_stride;
    keys = end = stream_length<kThreads>(p, s.list, s.visible, scratch);
  }
  const bool may_split = p.splits > 1 && num_queries <= p.partial_queries;
  s.split_length = may_split ? split_length(keys) : keys;
  s.num_splits = keys > s.split_length ? (keys + s.split_length - 1) / s.split_length : 1;
  s.stream_end = end;
  return split < s.num_splits;
}

// The keys of one of the stream's splits.
__device__ __forceinline__ void enter_split(Stream& s, int split) {
  s.begin = split * s.split_length;
  s.end = s.begin + s.split_length < s.stream_end ? s.begin + s.split_length : s.stream_end;
}

// Whether a row at a position sees a key; hidden keys have position -1.
__device__ __forceinline__ bool sees(const AttentionParams& p, const Stream& s, int position,
                                     int key) {
  const int distance = position - key;
  return key >= 0 && (!p.causal || distance >= 0) && (distance < s.window || key < p.sink_tokens);
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
    const float bias = companion_at<T>(p.key_bias.data, p.bias_is_float, offset);
    if (bias == -kInfinity) return key;
    key.bias = to_base_2(bias);
  }
  key.position = position;
  return key;
}

// Threads that copy a row of that many bytes: neighbours, up to a warp.
constexpr int lanes_of_row(int bytes) { return bytes / 16 < 32 ? bytes / 16 : 32; }

// Walks over the tiles of a stream that any row of the block sees. Once before the loop: start; in
// every round: wait, __syncthreads, advance. `kKeys` keys a tile, of head dimensions up to kDim.
template <class T, int kDim, int kKeys, int kThreads>
class KeyTiles {
 public:
  static constexpr int kLanes = lanes_of_row(kDim * sizeof(T));

  // Of p.stages tiles, and the places of one more.
  __device__ __forceinline__ static int tile_bytes(const AttentionParams& p) {
    const int v_bytes = p.v_within_k ? 0 : pitch_of(p.dim_v * sizeof(T));
    return kKeys * (pitch_of(p.dim * sizeof(T)) + v_bytes);
  }
  __device__ __forceinline__ static int place_bytes(const AttentionParams& p) {
    return (p.stages + 1) * (kKeys + 1) * static_cast<int>(sizeof(Key));
  }

  // zero_keys: hidden keys are zeros, else whatever was there.
  __device__ __forceinline__ KeyTiles(const AttentionParams& p, const Stream& s, int head,
                                      char* tiles, Key* places, bool zero_keys)
      : p_(p), s_(s), head_(head), tiles_(tiles), places_(places), zero_keys_(zero_keys) {}

  __device__ __forceinline__ void start() {
    tile_ = found_ = loaded_ = next(s_.begin / kKeys - 1);
    end_ = (s_.end + kKeys - 1) / kKeys;
    for (int slot = 0; slot < p_.stages; ++slot) {
      keep(slot, look_up(list_entry_at(found_)));
      found_ = next(found_);
    }
    place_ = look_up(list_entry_at(found_));
    found_ = next(found_);
    entry_ = list_entry_at(found_);
    __syncthreads();
    for (int i = 0; i + 1 < p_.stages; ++i) load(i, i);
  }

  __device__ __forceinline__ bool more() const { return tile_ < end_; }

  // For the tile worked on; others may have copied parts of it.
  __device__ __forceinline__ void wait() const {
    if (p_.stages == 2) {
      wait_copies<0>();
    } else if (p_.stages == 3) {
      wait_copies<1>();
    } else {
      wait_copies<2>();
    }
  }

  // Sends for a later tile, into the stage of the one before, which nobody reads any more.
  __device__ __forceinline__ void advance() {
    keep(before(slot_, p_.stages + 1), place_);
    load(before(stage_, p_.stages), before(before(slot_, p_.stages + 1), p_.stages + 1));
    place_ = look_up(entry_);
    found_ = next(found_);
    entry_ = list_entry_at(found_);
  }

  __device__ __forceinline__ void finish() {
    tile_ = next(tile_);
    stage_ = after(stage_, p_.stages);
    slot_ = after(slot_, p_.stages + 1);
  }

  __device__ __forceinline__ Tile keys() const {
    return {tiles_ + stage_ * tile_bytes(p_), pitch_of(p_.dim * sizeof(T))};
  }
  __device__ __forceinline__ Tile values() const { return values_in(stage_); }
  __device__ __forceinline__ const Key& place(int i) const { return slot(slot_)[i]; }

  // Whether rows at positions [first, last] see every key of the tile, with no bias.
  __device__ __forceinline__ bool seen_whole(int first, int last) const {
    const Key& flags = slot(slot_)[kKeys];
    if (flags.outer || flags.token || p_.key_bias.data) return false;
    if (p_.listed) return true;
    return (!p_.causal || (tile_ + 1) * kKeys - 1 <= first) &&
           (last - tile_ * kKeys < s_.window || (tile_ + 1) * kKeys <= p_.sink_tokens);
  }

 private:
  __device__ __forceinline__ static int before(int i, int n) { return i == 0 ? n - 1 : i - 1; }
  __device__ __forceinline__ static int after(int i, int n) { return i + 1 == n ? 0 : i + 1; }

  __device__ __forceinline__ int next(int tile) const {
    ++tile;
    const bool skip = tile * kKeys >= s_.sinks && (tile + 1) * kKeys <= s_.window_begin;
    return skip && !p_.listed ? s_.window_begin / kKeys : tile;
  }

  __device__ __forceinline__ Key* slot(int i) const { return places_ + i * (kKeys + 1); }
  __device__ __forceinline__ Tile values_in(int stage) const {
    char* const keys = tiles_ + stage * tile_bytes(p_);
    if (p_.v_within_k) return {keys, pitch_of(p_.dim * sizeof(T))};
    return {keys + kKeys * pitch_of(p_.dim * sizeof(T)), pitch_of(p_.dim_v * sizeof(T))};
  }

  __device__ __forceinline__ int64_t list_entry_at(int tile) const {
    return list_entry(p_, s_, tile * kKeys + static_cast<int>(threadIdx.x) % kKeys);
  }
  __device__ __forceinline__ Key look_up(int64_t entry) const {
    if (threadIdx.x >= kKeys) return {0, 0, -1, 0.f};
    return find_key<T>(p_, s_, head_, found_ * kKeys + static_cast<int>(threadIdx.x), entry);
  }

  // The places of a tile, and behind them, by warp, whether any is hidden.
  __device__ __forceinline__ void keep(int i, const Key& place) const {
    const int tid = threadIdx.x;
    if (tid >= (kKeys < 32 ? 32 : kKeys)) return;
    Key* const places = slot(i);
    if (tid < kKeys) places[tid] = place;
    const int hidden = __any_sync(kWholeWarp, tid < kKeys && place.position < 0);
    if (tid == 0) places[kKeys].outer = hidden;
    if (tid == (kKeys > 32 ? 32 : 1)) places[kKeys].token = kKeys > 32 ? hidden : 0;
  }

  __device__ __forceinline__ void load(int stage, int from) {
    if (loaded_ < end_) {
      const Tile k{tiles_ + stage * tile_bytes(p_), pitch_of(p_.dim * sizeof(T))};
      load_rows(k, slot(from), p_.k, p_.dim, zero_keys_ || p_.v_within_k);
      if (!p_.v_within_k) load_rows(values_in(stage), slot(from), p_.v, p_.dim_v, true);
      loaded_ = next(loaded_);
    }
    commit_copies();
  }

  // Hidden rows become zeros, or stay what they are.
  __device__ __forceinline__ void load_rows(const Tile& tile, const Key* places,
                                            const CacheRows& rows, int dim, bool zero) const {
    for (int i = threadIdx.x / kLanes; i < kKeys; i += kThreads / kLanes) {
      const Key key = places[i];
      const bool used = key.position >= 0;
      if (!used && !zero) continue;
      const T* row = static_cast<const T*>(rows.data) + key.outer * rows.outer_stride +
                     key.token * rows.token_stride + head_ * rows.head_stride;
      copy_row<T, kLanes>(tile, i, row, dim, threadIdx.x % kLanes, p_.aligned, used);
    }
  }

  const AttentionParams& p_;
  const Stream& s_;
  const int head_;
  char* const tiles_;
  Key* const places_;
  const bool zero_keys_;
  int tile_ = 0, found_ = 0, loaded_ = 0;  // worked on, looked up, loaded
  int end_ = 0;                            // behind the last
  int stage_ = 0, slot_ = 0;               // of the tile worked on
  Key place_{};                            // of a tile still to be kept
  int64_t entry_ = -1;                     // of the tile after it
};

}  // namespace memkernels::attention::cuda
