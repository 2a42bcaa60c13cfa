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

struct Sequence {
  int64_t q_begin;  // first row of q
  int64_t num_q;
  int64_t kv_len;
  int64_t kv_begin;  // first token of the packed K and V, else 0
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

// Where key j of sequence b lies: outer index (-1: an absent page) and token within it.
struct KeyPlace {
  int64_t outer, token;
};

inline KeyPlace place_of(const Problem& p, int64_t b, int64_t j) {
  if (p.packed) return {0, p.sequences[b].kv_begin + j};
  if (p.page_table == nullptr) return {b, j};
  const int64_t at = b * p.table_row_stride + j / p.page_size * p.table_stride;
  const int64_t page = p.wide_table ? static_cast<const int64_t*>(p.page_table)[at]
                                    : static_cast<const int32_t*>(p.page_table)[at];
  return {page, j % p.page_size};
}

// Calls visit(i, outer, token) for the keys j0 + i, i in [0, n); one table read a page.
template <class Visit>
inline void for_each_key(const Problem& p, int64_t b, int64_t j0, int64_t n, const Visit& visit) {
  int64_t i = 0;
  while (i < n) {
    const KeyPlace place = place_of(p, b, j0 + i);
    int64_t run = n - i;
    if (p.page_table != nullptr && run > p.page_size - place.token) run = p.page_size - place.token;
    for (int64_t t = 0; t < run; ++t) visit(i + t, place.outer, place.token + t);
    i += run;
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
