// The rows, queries times heads, that see the keys of a block, and their tiles in shared memory: to
// a block of keys what KeyTiles are to a block of rows.
#pragma once

#include "attention/key_stream.cuh"
#include "attention/paged_attention_backward_cuda.h"

namespace memkernels::attention::cuda {

// A query and head that see keys of the block: those before `high` that are not before `low`, or
// are before `sinks`, counted from the block's first key.
struct alignas(16) SeeingRow {
  int query, q_head;  // query -1: none
  int high, low, sinks;
  float lse, delta;
  int unused;
};

// Queries that see the block's keys through one entry of a page table, or as one sequence.
struct Source {
  int query;           // first row of q
  int first_position;  // of that query
  int length;          // of the sequence
  int base;            // position of the block's first key
  int begin, end;      // rows, queries times the group, that may see any
};

template <class T, int kDim, int kKeys>
struct KeyShape {
  static constexpr int kRows = rows_of_dkv(sizeof(T), kDim, kKeys);
  static constexpr int kWarpsOverRows = kKeys == 16 ? kRows / 16 : 1;
  static constexpr int kThreads = 2 * kKeys * kWarpsOverRows;
  static constexpr int kRowBlocks = kRows / 8 / kWarpsOverRows;
  static constexpr int kColumnBlocks = (kDim < kSlice ? kDim : kSlice) / 8;
  static constexpr int kLanes = lanes_of_row(kDim * sizeof(T));
};

// Walks over the rows that see a block's keys, kRows at a time, as KeyTiles over keys: two tiles in
// shared memory, the rows of a third.
template <class T, int kDim, int kKeys>
class RowTiles {
  using S = KeyShape<T, kDim, kKeys>;

 public:
  static constexpr int kStages = 2;

  __device__ __forceinline__ static int tile_bytes(const AttentionParams& p) {
    return S::kRows * (pitch_of(p.dim * sizeof(T)) + pitch_of(p.dim_v * sizeof(T)));
  }

  // The block's keys: the first is number `first` of unit `unit`, or of sequence `unit`.
  __device__ __forceinline__ RowTiles(const BackwardParams& params, int head, int64_t unit,
                                      int first, char* tiles, SeeingRow* rows)
      : params_(params), p_(params.a), head_(head), first_(first), tiles_(tiles), rows_(rows) {
    if (!params_.runs) {
      entry_ = 0;
      end_ = 1;
      sequence_ = static_cast<int>(unit);
    } else {
      const int64_t run = (params_.lists == 1 ? 0 : head * params_.num_units) + unit;
      entry_ = params_.run_begin[run];
      end_ = params_.run_begin[run + 1];
    }
    row_ = p_.listed ? 0 : open_source();
  }

  __device__ __forceinline__ bool empty() const { return !has_rows(); }

  __device__ __forceinline__ void start() {
    for (int slot = 0; slot < kStages; ++slot) keep(slot, take());
    next_ = take();
    __syncthreads();
    load(0, 0);
  }
  __device__ __forceinline__ bool more() const { return finished_ < taken_; }
  __device__ __forceinline__ void advance() {
    keep(slot_ == 0 ? 2 : slot_ - 1, next_);
    next_ = take();
    load(stage_ ^ 1, slot_ == 2 ? 0 : slot_ + 1);
  }
  __device__ __forceinline__ void finish() {
    ++finished_;
    stage_ ^= 1;
    slot_ = slot_ == 2 ? 0 : slot_ + 1;
  }

  __device__ __forceinline__ Tile queries() const { return queries_in(stage_); }
  __device__ __forceinline__ Tile douts() const { return douts_in(stage_); }
  __device__ __forceinline__ const SeeingRow& row(int i) const {
    return rows_[slot_ * S::kRows + i];
  }

 private:
  __device__ __forceinline__ Tile queries_in(int stage) const {
    return {tiles_ + stage * tile_bytes(p_), pitch_of(p_.dim * sizeof(T))};
  }
  __device__ __forceinline__ Tile douts_in(int stage) const {
    const Tile q = queries_in(stage);
    return {q.data + S::kRows * q.pitch, pitch_of(p_.dim_v * sizeof(T))};
  }

  __device__ __forceinline__ bool has_rows() const {
    return p_.listed ? entry_ + row_ / p_.group < end_ : entry_ < end_;
  }

  // Finds the source of the current entry, or of the next that has rows; returns its first row.
  __device__ __forceinline__ int open_source() {
    for (; entry_ < end_; ++entry_) {
      int64_t b = sequence_;
      source_.base = first_;
      if (params_.runs) {
        const int value = params_.entries[entry_], columns = params_.num_entries / p_.num_sequences;
        b = value / columns;
        source_.base += value % columns * p_.page_size;
      }
      find_source(b);
      if (source_.begin < source_.end) return source_.begin;
    }
    return 0;
  }

  __device__ __forceinline__ void find_source(int64_t b) {
    Source& s = source_;
    s.query = first_query(p_, b);
    const int queries = p_.cu_seqlens_q.data ? first_query(p_, b + 1) - s.query : 1;
    s.length = extent_of(p_, b).length;
    s.first_position = s.length - queries;
    // The first query that may see the first key, the last that may see the last.
    const int64_t begin = p_.causal ? int64_t{s.base} - s.first_position : 0;
    int64_t end = queries;
    if (s.base >= p_.sink_tokens) {
      end = clamp(int64_t{s.base} + kKeys - 1 + window_of(p_, head_) - s.first_position, 0, end);
    }
    s.begin = static_cast<int>(clamp(begin, 0, queries)) * p_.group;
    s.end = s.base < s.length ? static_cast<int>(end) * p_.group : 0;
  }

  // The rows of the next tile; this thread's one.
  __device__ __forceinline__ SeeingRow take() {
    SeeingRow row{-1, 0, 0, 0, 0, 0.f, 0.f, 0};
    if (!has_rows()) return row;
    ++taken_;
    const int r = row_ + static_cast<int>(threadIdx.x);
    const bool mine = threadIdx.x < S::kRows;
    if (p_.listed) {
      if (mine && entry_ + r / p_.group < end_)
        row = listed_row(entry_ + r / p_.group, r % p_.group);
      row_ += S::kRows;
      return row;
    }
    if (mine && r < source_.end) {
      row = seeing_row(source_.query + r / p_.group, r % p_.group,
                       source_.first_position + r / p_.group, source_.length, source_.base);
    }
    row_ += S::kRows;
    if (row_ >= source_.end) {
      ++entry_;
      row_ = open_source();
    }
    return row;
  }

  __device__ __forceinline__ SeeingRow listed_row(int entry, int within_group) const {
    const int value = params_.entries[entry];
    const int query = value / (params_.lists * p_.list_length);
    const int list = value / p_.list_length % params_.lists;
    const int64_t index =
        integer_at(p_.indices, query * p_.list_query_stride + list * p_.list_head_stride +
                                   value % p_.list_length * p_.indices.stride);
    int64_t b = query;
    int position_from_end = 1;
    if (p_.cu_seqlens_q.data) {
      b = last_at_most(p_.num_sequences, b, [&](int64_t i) { return first_query(p_, i); });
      position_from_end = first_query(p_, b + 1) - query;
    }
    const int length = extent_of(p_, b).length;
    return seeing_row(query, within_group, length - position_from_end, length,
                      static_cast<int>(index * p_.unit) + first_);
  }

  __device__ __forceinline__ SeeingRow seeing_row(int query, int within_group, int position,
                                                  int length, int base) const {
    const int q_head = head_ * p_.group + within_group;
    const int window = window_of(p_, head_);
    const int end = p_.causal && position + 1 < length ? position + 1 : length;
    const int64_t low = p_.listed ? 0 : int64_t{position} - window + 1;
    const RowGradient g = params_.rows[int64_t{query} * p_.num_heads + q_head];
    return {query,
            q_head,
            end - base,
            static_cast<int>(low > 0 ? low - base : -base),
            p_.sink_tokens - base,
            g.lse,
            g.delta,
            0};
  }

  __device__ __forceinline__ void keep(int slot, const SeeingRow& row) const {
    if (threadIdx.x < S::kRows) rows_[slot * S::kRows + threadIdx.x] = row;
  }

  __device__ __forceinline__ void load(int stage, int slot) {
    if (loaded_ < taken_) {
      const int lane = threadIdx.x % S::kLanes;
      for (int i = threadIdx.x / S::kLanes; i < S::kRows; i += S::kThreads / S::kLanes) {
        const SeeingRow& row = rows_[slot * S::kRows + i];
        const bool used = row.query >= 0;
        const int64_t query = used ? row.query : 0;
        copy_row<T, S::kLanes>(
            queries_in(stage), i,
            static_cast<const T*>(p_.q) + query * p_.q_stride + row.q_head * p_.q_head_stride,
            p_.dim, lane, p_.aligned, used);
        copy_row<T, S::kLanes>(douts_in(stage), i,
                               static_cast<const T*>(params_.dout) + query * params_.dout_stride +
                                   row.q_head * params_.dout_head_stride,
                               p_.dim_v, lane, params_.dout_aligned, used);
      }
      ++loaded_;
    }
    commit_copies();
  }

  const BackwardParams& params_;
  const AttentionParams& p_;
  const int head_, first_;
  char* const tiles_;
  SeeingRow* const rows_;
  int entry_ = 0, end_ = 0, sequence_ = 0;
  Source source_{};
  int row_ = 0;                                // of the source, or of all listed
  int taken_ = 0, loaded_ = 0, finished_ = 0;  // tiles
  int stage_ = 0, slot_ = 0;                   // of the tile worked on
  SeeingRow next_{};                           // of a tile still to be kept
};

}  // namespace memkernels::attention::cuda
