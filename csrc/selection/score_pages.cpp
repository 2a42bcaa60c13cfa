#include "selection/score_pages.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "attention/page_table.h"
#include "attention/plan.h"
#include "core/check.h"
#include "core/cuda/host_copy.h"
#include "core/memory.h"

namespace memkernels::selection {

namespace {

constexpr char kOp[] = "score_pages";

// Queries times heads of a group in a task.
constexpr int64_t kTaskRows = 32;

void check_arguments(const ScorePagesArgs& a) {
  check_floating(kOp, "q", a.q);
  check_shape(kOp, "q", a.q, "[total_q, Hq, D]", {-1, -1, -1});
  check_rows_contiguous(kOp, "q", a.q);
  const int64_t dim = a.q.shape[2];
  const bool minmax = a.kind == SummaryKind::minmax;
  if (minmax) {
    check_shape(kOp, "summary", a.summary, "[num_pages, Hkv, 2, D]", {-1, -1, 2, dim});
    check_dtype(kOp, "summary", a.summary, a.q.dtype);
    check(a.summary.stride[2] == dim || numel(a.summary) == 0, kOp,
          "summary must be contiguous in its last two dimensions");
  } else {
    check_shape(kOp, "summary", a.summary, "[num_pages, Hkv, D]", {-1, -1, dim});
    check_companion(kOp, "summary", a.summary, a.q.dtype);
  }
  check_rows_contiguous(kOp, "summary", a.summary);
  check_device(kOp, "summary", a.summary, a.q.device);
  const int64_t heads = a.summary.shape[1];
  check(a.q.shape[1] > 0, kOp, "q has no heads");
  check(std::isfinite(a.scale), kOp, "scale must be finite, got ", a.scale);
  check(heads > 0 && a.q.shape[1] % heads == 0, kOp, "q has ", a.q.shape[1],
        " heads, not a multiple of summary's ", heads);
  check(a.page_size > 0, kOp, "page_size must be at least 1, got ", a.page_size);
}

// Of the queries; refuses lengths, offsets and pages that contradict.
std::vector<int64_t> checked_offsets(const ScorePagesArgs& a) {
  const attention::PageTable table{a.page_table, a.seq_lens, a.page_size};
  std::vector<int64_t> offsets = attention::query_offsets(kOp, a.q, a.cu_seqlens_q, table.batch());
  table.check_contents(kOp, a.summary.shape[0]);
  return offsets;
}

}  // namespace

void score_pages(const ScorePagesArgs& a, const Context& ctx) {
  check_arguments(a);
  const attention::PageTable table{a.page_table, a.seq_lens, a.page_size};
  table.check_shapes(kOp, a.q.device);
  attention::check_query_offsets(kOp, a.q, a.cu_seqlens_q, table.batch());
#ifdef MEMKERNELS_WITH_CUDA
  if (ctx.device.type == DeviceType::cuda) {
    if (ctx.check_indices) {
      HostCopies copies(kOp, ctx);
      ScorePagesArgs read = a;
      for (TensorView* t : {&read.page_table, &read.seq_lens, &read.cu_seqlens_q}) {
        copies.replace(*t);
      }
      checked_offsets(read);
    }
    return cuda::score_pages(a, ctx);
  }
#endif
  const std::vector<int64_t> offsets = checked_offsets(a);

  const int64_t group = a.q.shape[1] / a.summary.shape[1];
  const int64_t block_queries = std::max<int64_t>(1, kTaskRows / group);
  double page_rows = 0;
  for (int64_t b = 0; b < table.batch(); ++b) {
    page_rows += static_cast<double>(offsets[b + 1] - offsets[b]) * table.used(b);
  }
  const double multiply_adds = page_rows * a.q.shape[1] * a.q.shape[2] * 2;
  const int workers = attention::workers_for(ctx, multiply_adds);

  std::vector<ScoreTask> tasks;
  for (int64_t b = 0; b < table.batch(); ++b) {
    const int64_t num_q = offsets[b + 1] - offsets[b], used = table.used(b);
    // Long stretches, since each task prepares its queries; but some for every worker.
    const double wanted = page_rows / (4.0 * workers * std::min(num_q, block_queries) + 1);
    const int64_t stretch = std::max<int64_t>(64, static_cast<int64_t>(wanted) / 16 * 16);
    for (int64_t i = 0; i < num_q; i += block_queries) {
      for (int64_t page = 0; page < used; page += stretch) {
        ScoreTask task{&a,
                       b,
                       offsets[b] + i,
                       std::min(block_queries, num_q - i),
                       page,
                       std::min(stretch, used - page),
                       table.length(b) - num_q + i};
        tasks.push_back(task);
      }
    }
    const int64_t heads = a.scores.shape[1], pages = a.scores.shape[2];
    for (int64_t row = offsets[b] * heads; row < offsets[b + 1] * heads; ++row) {
      fill_scalars(a.scores.data, a.scores.dtype, row * pages + used, (row + 1) * pages, -INFINITY);
    }
  }
  const Isa isa = isa_for(a.q.dtype);
  const ScoreKernel kernel = MEMKERNELS_CPU(isa, score_kernel)(a.q.dtype, a.summary.dtype);
  const size_t scratch_bytes = align_up(kernel.scratch_bytes(a, block_queries));
  const Workspace workspace = allocate_workspace(workers * scratch_bytes);
  run_tasks(ctx, workers, static_cast<int64_t>(tasks.size()), [&](int64_t i, int worker) {
    kernel.run(tasks[i], static_cast<char*>(workspace.get()) + worker * scratch_bytes);
  });
}

}  // namespace memkernels::selection
