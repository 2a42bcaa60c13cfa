#include "selection/summarize_keys.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "attention/page_table.h"
#include "core/check.h"
#include "core/cuda/host_copy.h"
#include "core/memory.h"

namespace memkernels::selection {

namespace {

using attention::PageTable;

PageTable table_of(const SummarizeKeysArgs& a) {
  return {a.page_table, a.seq_lens, a.k_cache.shape[1]};
}

void check_arguments(const char* op, const SummarizeKeysArgs& a) {
  check_floating(op, "k_cache", a.k_cache);
  check_shape(op, "k_cache", a.k_cache, "[num_pages, page_size, Hkv, D]", {-1, -1, -1, -1});
  check_rows_contiguous(op, "k_cache", a.k_cache);
  check(a.k_cache.shape[1] > 0, op, "k_cache has page_size 0");
  const int64_t num_pages = a.k_cache.shape[0], heads = a.k_cache.shape[2];
  const int64_t dim = a.k_cache.shape[3];
  if (a.kind == SummaryKind::minmax) {
    check_shape(op, "summary", a.summary, "[num_pages, Hkv, 2, D]", {num_pages, heads, 2, dim});
    check_dtype(op, "summary", a.summary, a.k_cache.dtype);
  } else {
    check_shape(op, "summary", a.summary, "[num_pages, Hkv, D]", {num_pages, heads, dim});
    check_dtype(op, "summary", a.summary, accumulator(a.k_cache.dtype));
  }
  check_contiguous(op, "summary", a.summary);
  check_device(op, "summary", a.summary, a.k_cache.device);
  table_of(a).check_shapes(op, a.k_cache.device);
}

int64_t num_new_of(const NewTokens& added, int64_t b) {
  return given(added.each) ? index_at(added.each, b * added.each.stride[0]) : added.all;
}

void check_contents(const char* op, const SummarizeKeysArgs& a, const NewTokens& added) {
  table_of(a).check_contents(op, a.k_cache.shape[0]);
  for (int64_t b = 0; b < a.seq_lens.shape[0] && given(added.each); ++b) {
    check(num_new_of(added, b) >= 0, op, "num_new must not be negative, got ", num_new_of(added, b),
          " for sequence ", b);
  }
}

#ifdef MEMKERNELS_WITH_CUDA
void check_on_host(const char* op, SummarizeKeysArgs a, NewTokens added, const Context& ctx) {
  HostCopies copies(op, ctx);
  for (TensorView* t : {&a.page_table, &a.seq_lens, &added.each}) copies.replace(*t);
  check_contents(op, a, added);
}
#endif

// How many tokens of each physical page are in use: of its longest sequence.
Workspace page_fills(const SummarizeKeysArgs& a) {
  const PageTable table = table_of(a);
  const int64_t num_pages = a.k_cache.shape[0];
  Workspace fills = allocate_workspace(num_pages * sizeof(int32_t));
  std::memset(fills.get(), 0, num_pages * sizeof(int32_t));
  int32_t* fill = static_cast<int32_t*>(fills.get());
  for (int64_t b = 0; b < table.batch(); ++b) {
    for (int64_t i = 0; i < table.used(b); ++i) {
      const int64_t page = table.page(b, i);
      if (page < 0) continue;
      const int64_t tokens = std::min(table.page_size, table.length(b) - i * table.page_size);
      fill[page] = std::max(fill[page], static_cast<int32_t>(tokens));
    }
  }
  return fills;
}

// Summarizes num_pages pages, the i-th of which is page_at(i).
template <class PageAt>
void summarize(const SummarizeKeysArgs& a, const int32_t* fill, int64_t num_pages,
               const PageAt& page_at, const Context& ctx) {
  const TensorView& k = a.k_cache;
  const int64_t size = item_size(k.dtype), summary_bytes = item_size(a.summary.dtype);
  const int64_t page_elements = k.shape[1] * k.shape[2] * k.shape[3];
  const int64_t per_task = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, page_elements));
  const int64_t num_tasks = (num_pages + per_task - 1) / per_task;
  const int workers = num_tasks > 2 ? ctx.num_workers : 1;
  const Isa isa = isa_for(k.dtype);
  const SummaryKernel kernel = MEMKERNELS_CPU(isa, summary_kernel)(k.dtype);
  const size_t scratch_bytes = align_up(kernel.scratch_bytes(k.shape[2], k.shape[3]));
  const Workspace workspace = allocate_workspace(workers * scratch_bytes);
  run_tasks(ctx, workers, num_tasks, [&](int64_t task, int worker) {
    const int64_t end = std::min(num_pages, (task + 1) * per_task);
    for (int64_t i = task * per_task; i < end; ++i) {
      const int64_t page = page_at(i);
      const SummaryPage job{
          static_cast<const char*>(k.data) + page * k.stride[0] * size,
          fill[page],
          k.stride[1],
          k.stride[2],
          k.shape[2],
          k.shape[3],
          static_cast<char*>(a.summary.data) + page * a.summary.stride[0] * summary_bytes};
      kernel.run(job, a.kind, static_cast<char*>(workspace.get()) + worker * scratch_bytes);
    }
  });
}

}  // namespace

void summarize_keys(const SummarizeKeysArgs& a, const Context& ctx) {
  constexpr char op[] = "summarize_keys";
  check_arguments(op, a);
#ifdef MEMKERNELS_WITH_CUDA
  if (ctx.device.type == DeviceType::cuda) {
    if (ctx.check_indices) check_on_host(op, a, {}, ctx);
    return cuda::summarize_keys(op, a, nullptr, ctx);
  }
#endif
  check_contents(op, a, {});
  const Workspace fills = page_fills(a);
  summarize(
      a, static_cast<const int32_t*>(fills.get()), a.k_cache.shape[0], [](int64_t i) { return i; },
      ctx);
}

void update_summaries(const SummarizeKeysArgs& a, const NewTokens& added, const Context& ctx) {
  constexpr char op[] = "update_summaries";
  check_arguments(op, a);
  const PageTable table = table_of(a);
  if (given(added.each)) {
    check_shape(op, "num_new", added.each, "[B]", {table.batch()});
    check_index(op, "num_new", added.each);
    check_device(op, "num_new", added.each, a.k_cache.device);
  } else {
    check(added.all >= 0, op, "num_new must not be negative, got ", added.all);
  }
#ifdef MEMKERNELS_WITH_CUDA
  if (ctx.device.type == DeviceType::cuda) {
    if (ctx.check_indices) check_on_host(op, a, added, ctx);
    return cuda::summarize_keys(op, a, &added, ctx);
  }
#endif
  check_contents(op, a, added);
  std::vector<int64_t> touched;
  for (int64_t b = 0; b < table.batch(); ++b) {
    const int64_t count = num_new_of(added, b);
    if (count == 0) continue;
    for (int64_t i = std::max<int64_t>(0, table.length(b) - count) / table.page_size;
         i < table.used(b); ++i) {
      if (table.page(b, i) >= 0) touched.push_back(table.page(b, i));
    }
  }
  std::sort(touched.begin(), touched.end());
  touched.erase(std::unique(touched.begin(), touched.end()), touched.end());
  const Workspace fills = page_fills(a);
  summarize(
      a, static_cast<const int32_t*>(fills.get()), static_cast<int64_t>(touched.size()),
      [&](int64_t i) { return touched[i]; }, ctx);
}

}  // namespace memkernels::selection
