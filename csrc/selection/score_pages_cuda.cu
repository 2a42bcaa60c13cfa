#include "selection/score_pages.h"

#include <algorithm>

#include "selection/score_pages_kernel.cuh"

namespace memkernels::selection::cuda {

void score_pages(const ScorePagesArgs& a, const Context& ctx) {
  constexpr char op[] = "score_pages";
  check_supported(op, "q", a.q);
  ScoreParams p{};
  p.q = a.q.data;
  p.q_dtype = a.q.dtype;
  p.q_stride = a.q.stride[0];
  p.q_head_stride = a.q.stride[1];
  p.minmax = a.kind == SummaryKind::minmax;
  p.dim = as_int(op, "channels of a head", a.q.shape[2]);
  p.width = as_int(op, "channels of a summary", a.q.shape[2] * (p.minmax ? 2 : 1));
  p.summary = a.summary.data;
  p.page_stride = a.summary.stride[0];
  p.head_stride = a.summary.stride[1];
  const int64_t size = item_size(a.summary.dtype);
  p.aligned = reinterpret_cast<uintptr_t>(p.summary) % 16 == 0 &&
              (p.page_stride | p.head_stride) * size % 16 == 0;
  p.page_table = integers(a.page_table, 1);
  p.table_row_stride = a.page_table.stride[0];
  p.seq_lens = integers(a.seq_lens);
  p.cu_seqlens_q = integers(a.cu_seqlens_q);
  p.num_sequences = as_int(op, "sequences", a.page_table.shape[0]);
  p.total_q = as_int(op, "queries", a.q.shape[0]);
  p.kv_heads = as_int(op, "heads", a.summary.shape[1]);
  p.group = static_cast<int>(a.q.shape[1] / p.kv_heads);
  p.num_pages = a.summary.shape[0];
  p.max_pages = a.page_table.shape[1];
  p.page_size = as_int(op, "tokens of a page", a.page_size);
  p.causal = a.causal;
  p.reduce = a.reduce;
  p.scale = static_cast<float>(a.scale);
  p.scores = static_cast<float*>(a.scores.data);
  if (p.total_q == 0 || p.max_pages == 0) return;
  const DeviceGuard guard(op, ctx.device);

  const auto bytes_of = [&](int columns) {
    return columns * query_pitch(p.width * size) + kBlockPages * (columns + 1) * int64_t{4};
  };
  const int64_t most = limits_of(op, ctx.device).of_block;
  const bool several = given(a.cu_seqlens_q) && p.total_q > p.num_sequences;
  const int64_t rows = int64_t{p.group} * (several ? ceil_div(p.total_q, p.num_sequences) : 1);
  const int columns = rows > 8 && bytes_of(32) <= most ? 32 : 8;
  check(bytes_of(columns) <= most, op, "head dim ", p.dim, " needs more than the ", most,
        " bytes of shared memory of a block on this GPU");
  p.queries = std::max(1, columns / p.group);
  p.page_tiles = static_cast<int>(ceil_div(p.max_pages, kBlockPages));
  const int64_t slots = given(a.cu_seqlens_q) ? p.total_q / p.queries + p.num_sequences : p.total_q;
  with_type(a.summary.dtype, [&](auto type) {
    using T = decltype(type);
    launch(op, ctx, columns == 8 ? score_pages<T, 1> : score_pages<T, 4>,
           slots * p.page_tiles * p.kv_heads, 32 * kScoreWarps, bytes_of(columns), p);
  });
}

}  // namespace memkernels::selection::cuda
