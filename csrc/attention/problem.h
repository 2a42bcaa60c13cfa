// Paged attention, validated and flattened: what the kernels read.
#pragma once

#include "core/tensor.h"

namespace memkernels::attention {

// Rows of one head dimension, addressed [outer, token, head]; strides in elements.
struct Rows {
  char* data = nullptr;
  Dtype dtype = Dtype::f32;
  int64_t outer_stride = 0;  // page, or sequence
  int64_t token_stride = 0;
  int64_t head_stride = 0;
};

// Queries that attend to the same stream of keys: those of a sequence; or, with lists of indices, a
// single one, whose stream is the tokens of the listed pages, or the listed tokens, in that order.
struct Sequence {
  int64_t q_begin;  // first row of q
  int64_t num_q;
  int64_t kv_len;       // of the stream
  int64_t kv_begin;     // first token of the packed K and V, else 0
  int64_t row;          // of the page table, or of contiguous K and V
  int64_t num_visible;  // with indices: tokens of the sequence that the query sees
};

// Integers [total_q, Hkv or 1, K].
struct IndexLists {
  const void* data = nullptr;
  bool wide = false;                                      // int64, else int32
  int64_t query_stride = 0, head_stride = 0, stride = 0;  // head_stride 0: the same for all heads
  int64_t unit = 1;                                       // tokens an index stands for
};

struct Problem {
  Dtype dtype;
  int64_t num_heads, num_kv_heads, group;  // group = num_heads / num_kv_heads
  int64_t dim, dim_v;
  Rows q, k, v, key_bias, out, lse;  // q, out and lse have no outer dimension
  const void* page_table;            // null: K and V are contiguous or packed
  bool wide_table;                   // int64, else int32
  int64_t table_row_stride, table_stride;
  int64_t page_size;  // tokens an outer index covers
  bool packed;
  IndexLists indices;  // no data: sequences are read from their beginning
  double scale, softcap;
  bool causal;
  int64_t sink_tokens;
  const int64_t* window;     // [Hkv], kNoWindow for full heads
  bool same_window;          // over the heads
  const double* sink_logit;  // [Hq] or null
  const Sequence* sequences;
  int64_t num_sequences;
};

inline constexpr int64_t kNoWindow = INT64_MAX;

namespace {

// Keys [0, sinks) and [begin, end) of a sequence, with sinks <= begin <= end.
struct KeyRange {
  int64_t sinks, begin, end;
};

// What the queries at positions [first, last] of a sequence of length L see, together.
inline KeyRange visible_keys(const Problem& p, int64_t kv_head, int64_t L, int64_t first,
                             int64_t last) {
  int64_t end = p.causal && last + 1 < L ? last + 1 : L;
  if (end < 0) end = 0;
  const int64_t window = p.window[kv_head];
  int64_t begin = window == kNoWindow ? 0 : first - window + 1;
  if (begin < 0) begin = 0;
  if (begin > end) begin = end;
  return {p.sink_tokens < begin ? p.sink_tokens : begin, begin, end};
}

inline int64_t integer_at(const void* data, bool wide, int64_t at) {
  return wide ? static_cast<const int64_t*>(data)[at] : static_cast<const int32_t*>(data)[at];
}

// Consecutive keys of a stream that lie one behind the other: outer index (-1: there are none),
// first token within it, and how many.
struct KeyRun {
  int64_t outer, token, count;
};

// The run that begins at key j of a sequence's stream; at most n keys.
inline KeyRun run_at(const Problem& p, int64_t b, int64_t kv_head, int64_t j, int64_t n) {
  const Sequence& s = p.sequences[b];
  if (p.packed) return {0, s.kv_begin + j, n};
  if (p.indices.data != nullptr) {
    const IndexLists& lists = p.indices;
    const int64_t skip = j % lists.unit;
    const int64_t index = integer_at(
        lists.data, lists.wide,
        b * lists.query_stride + kv_head * lists.head_stride + j / lists.unit * lists.stride);
    if (n > lists.unit - skip) n = lists.unit - skip;
    j = index * lists.unit + skip;
    if (index < 0 || j >= s.num_visible) return {-1, 0, n};
    if (n > s.num_visible - j) n = s.num_visible - j;
  }
  if (p.page_table == nullptr) return {s.row, j, n};
  const int64_t token = j % p.page_size;
  const int64_t page = integer_at(p.page_table, p.wide_table,
                                  s.row * p.table_row_stride + j / p.page_size * p.table_stride);
  return {page, token, n < p.page_size - token ? n : p.page_size - token};
}

// Calls visit(i, outer, token) for the keys j0 + i, i in [0, n), of a stream; one table read a run.
template <class Visit>
inline void for_each_key(const Problem& p, int64_t b, int64_t kv_head, int64_t j0, int64_t n,
                         const Visit& visit) {
  for (int64_t i = 0; i < n;) {
    const KeyRun run = run_at(p, b, kv_head, j0 + i, n - i);
    for (int64_t t = 0; t < run.count; ++t) visit(i + t, run.outer, run.token + t);
    i += run.count;
  }
}

// The last sequence whose first task is <= task.
template <class Tasks>
inline int64_t sequence_of_task(const Tasks* tasks, int64_t num_sequences, int64_t task) {
  int64_t b = 0, past = num_sequences;
  while (past - b > 1) {
    const int64_t middle = (b + past) / 2;
    (tasks[middle].first_task <= task ? b : past) = middle;
  }
  return b;
}

}  // namespace
}  // namespace memkernels::attention
