// What the CUDA kernels of paged attention read, and where they are chosen.
#pragma once

#include "attention/plan.h"
#include "core/cuda/launch.h"

namespace memkernels::attention::cuda {

using namespace memkernels::cuda;

// Longer queries than these fill the GPU without splitting keys, and would need large partials.
inline constexpr int kMaxSplitQueries = 16;
inline constexpr int kMaxSplits = 32;
inline constexpr int kMergeThreads = 128;
inline constexpr int kNoLimit = 0x7fffffff;

// Head dimensions up to which kernels exist; smaller ones take the next.
inline constexpr int kDims[] = {64, 128, 256, 576};

// Keys a block works on at a time: 16 to 64, some 16 KiB of them. Rounding depends on it.
constexpr int keys_of_tile(int item_size, int dim) {
  const int row = item_size * dim;
  return row <= 256 ? 64 : item_size == 2 || row <= 512 ? 32 : 16;
}

// Blocks have 16 rows, 64, or, where their sums fit into registers, 128.
constexpr bool has_large_blocks(int item_size, int dim) { return item_size == 2 && dim <= 128; }

// Rows of one head dimension, addressed [outer, token, head]; strides in elements.
struct CacheRows {
  const void* data = nullptr;
  int64_t outer_stride = 0, token_stride = 0, head_stride = 0;
};

// The greatest logit of a split, base 2, and the sum of powers relative to it.
struct PartialState {
  float maximum, sum;
};

struct AttentionParams {
  const void* q;                    // [total_q, Hq, D]
  int64_t q_stride, q_head_stride;  // in elements
  CacheRows k, v, key_bias;         // key_bias.data may be null
  bool bias_is_float;
  bool aligned;     // rows of q, K and V can be copied by 16 bytes
  bool v_within_k;  // V is the first Dv columns of K
  Integers page_table, seq_lens, cu_seqlens_q, cu_seqlens_k, head_window, indices;
  int64_t table_row_stride, list_query_stride, list_head_stride;
  const void* sink_logit;  // [Hq] or null
  bool sink_is_float;
  int64_t sink_stride;

  int num_sequences, total_q, num_heads, num_kv_heads, group, dim, dim_v;
  int num_pages, page_size;
  bool listed;               // keys are those that indices name
  int list_length, unit;     // entries of a list, and tokens one stands for
  int capacity, max_length;  // tokens that a sequence, or packed K, can hold; that one may have
  float scale, softcap;
  bool causal;
  int window, sink_tokens;

  int blocks_of_query;  // of rows; 0: sequences have several queries
  int splits;           // that a row may have
  int split_blocks;     // launched for each block of rows; they share its splits
  int stages;           // tiles in shared memory
  void* out;            // [total_q, Hq, Dv]
  float* lse;           // [total_q, Hq]
  // Where splits > 1: partial results of the queries of sequences that have at most
  // partial_queries, so many of each sequence; or of all queries, if they are fewer.
  int partial_queries;
  bool partial_by_query;
  float* partial_out;            // [those queries, Hq, splits, Dv]
  PartialState* partial_states;  // [those queries, Hq, splits]
  // [blocks of rows, Hkv], zeroed: blocks that have stored theirs, of which the last merges all; or
  // null: a kernel of its own does.
  int* arrivals;
};

// The head dimension of the kernels that take this one.
int class_of(int64_t dim);

// All but the results, and how work is shared out. Refuses dtypes that the kernels lack.
AttentionParams params_of(const char* op, const PagedAttentionArgs& args, const Shapes& shapes);

// Sets blocks_of_query, for blocks of that many rows; returns how many blocks of rows there are.
int64_t plan_rows(AttentionParams& p, const PagedAttentionArgs& args, int rows);

// Whether rows can be copied by 16 bytes.
bool aligned_to_16(const CacheRows& rows, int64_t dim, int64_t item_size);

// Bytes of shared memory of a block of `rows` rows, with as many stages as are worth having.
struct SharedPlan {
  int stages = 0;  // 0: not even two fit
  int64_t bytes = 0;
};
SharedPlan plan_shared(const AttentionParams& p, int item_size, int rows, const Limits& limits);

// Compiled one pair of T and kDim a file (paged_attention_instance.cu).
template <class T, int kDim>
void launch_attention(const char* op, const AttentionParams& p, int rows, int64_t blocks,
                      int64_t shared_bytes, const Context& ctx);

}  // namespace memkernels::attention::cuda
