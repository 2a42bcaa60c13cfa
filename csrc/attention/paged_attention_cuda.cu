// From the arguments of paged attention to the kernels and their grid.
#include "attention/paged_attention_cuda.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <utility>

#include "attention/paged_attention_kernel.cuh"
#include "attention/plan.h"

namespace memkernels::attention::cuda {

namespace {

using Launch = void (*)(const char*, const AttentionParams&, int, int64_t, int64_t, const Context&);

template <class T>
Launch launch_for(int dim_class) {
  switch (dim_class) {
    case 64:
      return launch_attention<T, 64>;
    case 128:
      return launch_attention<T, 128>;
    case 256:
      return launch_attention<T, 256>;
    default:
      return launch_attention<T, 576>;
  }
}

Launch launch_for(Dtype dtype, int dim_class) {
  switch (dtype) {
    case Dtype::f32:
      return launch_for<float>(dim_class);
    case Dtype::bf16:
      return launch_for<bf16>(dim_class);
    default:
      return launch_for<f16>(dim_class);
  }
}

CacheRows cache_rows(const TensorView& t, int leading) {
  const Rows rows = rows_of(t, leading);
  return {rows.data, rows.outer_stride, rows.token_stride, rows.head_stride};
}

// Multi-head latent attention keeps V in the first columns of K.
bool v_within_k(const PagedAttentionArgs& a) {
  const TensorView &k = a.k_cache, &v = a.v_cache;
  return k.data == v.data && v.shape[v.ndim - 1] <= k.shape[k.ndim - 1] &&
         std::equal(k.stride, k.stride + k.ndim - 1, v.stride);
}

// One query a sequence, or one list a query: blocks of rows are counted by queries.
bool single_queries(const PagedAttentionArgs& a) {
  return given(a.indices) || !given(a.cu_seqlens_q);
}

}  // namespace

int class_of(int64_t dim) {
  return *std::lower_bound(std::begin(kDims), std::end(kDims), static_cast<int>(dim));
}

bool aligned_to_16(const CacheRows& rows, int64_t dim, int64_t size) {
  const int64_t numbers = rows.outer_stride | rows.token_stride | rows.head_stride | dim;
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && numbers * size % 16 == 0;
}

AttentionParams params_of(const char* op, const PagedAttentionArgs& a, const Shapes& shapes) {
  check_supported(op, "q", a.q);
  AttentionParams p{};
  const int64_t size = item_size(a.q.dtype);
  p.q = a.q.data;
  p.q_stride = a.q.stride[0];
  p.q_head_stride = a.q.stride[1];
  p.k = cache_rows(a.k_cache, shapes.kv_dims - 1);
  p.v = cache_rows(a.v_cache, shapes.kv_dims - 1);
  p.key_bias = cache_rows(a.key_bias, shapes.kv_dims - 1);
  p.bias_is_float = a.key_bias.dtype == Dtype::f32;
  p.aligned = aligned_to_16(p.k, shapes.dim, size) && aligned_to_16(p.v, shapes.dim_v, size) &&
              aligned_to_16({a.q.data, a.q.stride[0], a.q.stride[1], 0}, shapes.dim, size);
  p.v_within_k = v_within_k(a);
  p.page_table = integers(a.page_table, 1);
  p.table_row_stride = shapes.paged ? a.page_table.stride[0] : 0;
  p.seq_lens = integers(a.seq_lens);
  p.cu_seqlens_q = integers(a.cu_seqlens_q);
  p.cu_seqlens_k = integers(a.cu_seqlens_k);
  p.head_window = integers(a.head_window);
  p.sink_logit = a.sink_logit.data;
  p.sink_is_float = a.sink_logit.dtype == Dtype::f32;
  p.sink_stride = given(a.sink_logit) ? a.sink_logit.stride[0] : 0;

  p.num_sequences = as_int(op, "sequences", shapes.batch);
  p.total_q = as_int(op, "queries", shapes.total_q);
  as_int(op, "queries times heads", shapes.total_q * shapes.heads);
  p.num_heads = static_cast<int>(shapes.heads);
  p.num_kv_heads = static_cast<int>(shapes.kv_heads);
  p.group = static_cast<int>(shapes.heads / shapes.kv_heads);
  p.dim = static_cast<int>(shapes.dim);
  p.dim_v = static_cast<int>(shapes.dim_v);
  p.num_pages = as_int(op, "pages", a.k_cache.shape[0]);
  p.page_size = shapes.packed ? 1 : as_int(op, "tokens of a page", a.k_cache.shape[1]);
  const int64_t capacity = shapes.packed  ? a.k_cache.shape[0]
                           : shapes.paged ? a.page_table.shape[1] * a.k_cache.shape[1]
                                          : a.k_cache.shape[1];
  p.capacity = static_cast<int>(std::min<int64_t>(capacity, kNoLimit));
  p.max_length = p.capacity;
  if (a.max_seqlen >= 0) {
    p.max_length = static_cast<int>(std::min<int64_t>(a.max_seqlen, p.capacity));
  }
  p.unit = 1;
  p.listed = given(a.indices);
  if (p.listed) {
    p.indices = integers(a.indices, 2);
    p.list_query_stride = a.indices.stride[0];
    p.list_head_stride = a.indices.shape[1] == 1 ? 0 : a.indices.stride[1];
    p.list_length = as_int(op, "entries of a list", a.indices.shape[2]);
    if (a.index_pages) p.unit = p.page_size;
    as_int(op, "listed tokens", int64_t{p.list_length} * p.unit);
  }
  p.scale = static_cast<float>(a.scale);
  p.softcap = static_cast<float>(a.softcap);
  p.causal = a.causal;
  p.window = a.window < 0 ? kNoLimit : static_cast<int>(std::min<int64_t>(a.window, kNoLimit));
  p.sink_tokens = static_cast<int>(std::min<int64_t>(a.sink_tokens, kNoLimit));
  p.splits = p.split_blocks = p.partial_queries = 1;
  p.out = a.out.data;
  p.lse = static_cast<float*>(a.lse.data);
  return p;
}

int64_t plan_rows(AttentionParams& p, const PagedAttentionArgs& a, int rows) {
  const bool single = single_queries(a);
  p.blocks_of_query = single ? static_cast<int>(ceil_div(p.group, rows)) : 0;
  return single ? int64_t{p.total_q} * p.blocks_of_query
                : int64_t{p.total_q} * p.group / rows + p.num_sequences;
}

SharedPlan plan_shared(const AttentionParams& p, int item_size, int rows, const Limits& limits) {
  const int dim_class = class_of(std::max(p.dim, p.dim_v));
  const int keys = keys_of_tile(item_size, dim_class);
  const int64_t k_pitch = pitch_of(int64_t{p.dim} * item_size);
  const int64_t v_pitch = p.v_within_k ? 0 : pitch_of(int64_t{p.dim_v} * item_size);
  const bool exchanges = rows == 16 || dim_class > 256;
  const int64_t fixed = rows * (k_pitch + (exchanges ? (keys + 8) * 4 : 0));
  constexpr int64_t kReserved = 1024;  // of each block, by the system
  SharedPlan plan;
  bool two_fit = false;  // blocks a multiprocessor: worth more than a deeper pipeline
  for (int stages = 2; stages <= 4; ++stages) {
    const int64_t bytes =
        fixed + stages * keys * (k_pitch + v_pitch) + (stages + 1) * (keys + 1) * 16;
    const bool two = 2 * (bytes + kReserved) <= limits.of_multiprocessor;
    if (bytes > limits.of_block || (two_fit && !two)) break;
    two_fit = two;
    plan = {stages, bytes};
  }
  return plan;
}

void paged_attention(const char* op, const PagedAttentionArgs& a, const Shapes& shapes,
                     const Context& ctx) {
  const int size = static_cast<int>(item_size(a.q.dtype));
  const int dim_class = class_of(std::max(shapes.dim, shapes.dim_v));
  AttentionParams p = params_of(op, a, shapes);
  if (shapes.total_q == 0 || shapes.heads == 0) return;
  const DeviceGuard guard(op, ctx.device);

  // Blocks of as few rows as hold a sequence's, on average, without reading keys twice.
  const Limits limits = limits_of(op, ctx.device);
  const int64_t mean_rows =
      single_queries(a) ? p.group : ceil_div(shapes.total_q, shapes.batch) * p.group;
  int rows = mean_rows <= 16 ? 16 : mean_rows > 64 && has_large_blocks(size, dim_class) ? 128 : 64;
  SharedPlan shared = plan_shared(p, size, rows, limits);
  if (shared.stages == 0) {
    rows = 16;
    shared = plan_shared(p, size, rows, limits);
  }
  check(shared.stages > 0, op, "head dims ", p.dim, " and ", p.dim_v, " in ", name(a.q.dtype),
        " need more than the ", limits.of_block, " bytes of shared memory of a block on this GPU");
  p.stages = shared.stages;

  const int64_t slots = plan_rows(p, a, rows);
  const int64_t keys = given(a.indices)
                           ? std::min<int64_t>(int64_t{p.list_length} * p.unit, kNoLimit)
                           : p.max_length;
  p.partial_queries = given(a.cu_seqlens_q) ? std::min(p.total_q, kMaxSplitQueries) : 1;
  // Packed keys have as many queries, as a rule, so that they are never split.
  p.splits =
      shapes.packed ? 1 : static_cast<int>(std::clamp<int64_t>(ceil_div(keys, 256), 1, kMaxSplits));
  const int64_t merged_rows = single_queries(a) ? std::min(rows, p.group) : rows;
  const int64_t merged_parts = merged_rows * ceil_div(p.dim_v, 128);  // of a warp
  if (p.splits > 1) {
    const int64_t of_sequences = shapes.batch * p.partial_queries;
    p.partial_by_query = shapes.total_q <= of_sequences;
    const int64_t partials = std::min(shapes.total_q, of_sequences) * shapes.heads * p.splits;
    p.partial_out = static_cast<float*>(ctx.allocate(ctx, partials * shapes.dim_v * 4));
    p.partial_states =
        static_cast<PartialState*>(ctx.allocate(ctx, partials * sizeof(PartialState)));
    if (rows == 16 && merged_parts <= 2 * kMergeThreads / 32) {
      const int64_t bytes = slots * shapes.kv_heads * sizeof(int);
      p.arrivals = static_cast<int*>(ctx.allocate(ctx, bytes));
      clear(op, ctx, p.arrivals, bytes);
    }
  }
  p.split_blocks = p.splits;
  if (rows == 16) {
    // The host knows no lengths, so most splits may be empty: in decoding a few blocks share those
    // of their rows, enough to fill the GPU some times over.
    const int64_t filled = ceil_div(8 * limits.multiprocessors, slots * shapes.kv_heads);
    p.split_blocks = static_cast<int>(std::clamp<int64_t>(filled, std::min(4, p.splits), p.splits));
  }
  launch_for(a.q.dtype, dim_class)(op, p, rows, slots * p.split_blocks * shapes.kv_heads,
                                   shared.bytes, ctx);
  if (p.splits == 1 || p.arrivals) return;
  with_type(a.q.dtype, [&](auto type) {
    using T = decltype(type);
    const int blocks = static_cast<int>(ceil_div(merged_parts, kMergeThreads / 32));
    const auto kernel = rows == 16   ? merge_rows<T, 16>
                        : rows == 64 ? merge_rows<T, 64>
                                     : merge_rows<T, 128>;
    launch(op, ctx, kernel, slots * shapes.kv_heads * blocks, kMergeThreads,
           kMergeThreads / 32 * sizeof(int), p, blocks);
  });
}

}  // namespace memkernels::attention::cuda
