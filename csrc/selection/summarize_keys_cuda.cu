#include "selection/summarize_keys.h"

#include <algorithm>

#include "selection/summarize_keys_kernel.cuh"

namespace memkernels::selection::cuda {

void summarize_keys(const char* op, const SummarizeKeysArgs& a, const NewTokens* added,
                    const Context& ctx) {
  const TensorView& k = a.k_cache;
  check_supported(op, "k_cache", k);
  SummarizeParams p{};
  p.k = k.data;
  p.page_stride = k.stride[0];
  p.token_stride = k.stride[1];
  p.head_stride = k.stride[2];
  p.page_table = integers(a.page_table, 1);
  p.table_row_stride = a.page_table.stride[0];
  p.seq_lens = integers(a.seq_lens);
  p.num_pages = k.shape[0];
  p.page_size = as_int(op, "tokens of a page", k.shape[1]);
  p.max_pages = a.page_table.shape[1];
  p.num_entries = as_int(op, "entries of the page table", numel(a.page_table));
  p.heads = static_cast<int>(k.shape[2]);
  p.dim = static_cast<int>(k.shape[3]);
  as_int(op, "elements of a key", k.shape[2] * k.shape[3] * kSummaryThreads);
  p.minmax = a.kind == SummaryKind::minmax;
  p.summary = a.summary.data;
  int64_t blocks = p.num_pages;
  if (added) {
    p.num_new = integers(added->each);
    p.num_new_all = added->all;
    p.most_new_pages = p.max_pages;
    if (!given(added->each)) {
      const int64_t tokens = std::min(added->all, p.max_pages * p.page_size);
      p.most_new_pages = std::min(p.max_pages, ceil_div(tokens, p.page_size) + 1);
    }
    blocks = a.seq_lens.shape[0] * p.most_new_pages;
    if (blocks > p.num_pages) {
      p.most_new_pages = 0;
      blocks = p.num_pages;
    }
  }
  if (p.num_pages == 0 || blocks == 0) return;
  const DeviceGuard guard(op, ctx.device);
  const int64_t arrays = added ? 2 : 1, bytes = arrays * p.num_pages * sizeof(int);
  p.fills = static_cast<int*>(ctx.allocate(ctx, bytes));
  if (added) p.claims = p.fills + p.num_pages;
  clear(op, ctx, p.fills, bytes);
  launch(op, ctx, find_fills, ceil_div(p.num_entries, 256), 256, 0, p);
  with_type(k.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kElements = 16 / sizeof(T);
    const int64_t numbers = p.page_stride | p.token_stride | p.head_stride | p.dim;
    const bool aligned = reinterpret_cast<uintptr_t>(k.data) % 16 == 0 && numbers % kElements == 0;
    launch(op, ctx, aligned ? summarize<T, kElements> : summarize<T, 1>, blocks, kSummaryThreads, 0,
           p);
  });
}

}  // namespace memkernels::selection::cuda
