#include "selection/indexer_scores.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "attention/plan.h"
#include "core/check.h"
#include "core/memory.h"
#include "selection/stretch.h"

namespace memkernels::selection {

namespace {

using attention::Problem;
using attention::Sequence;

void check_arguments(const char* op, const IndexerArgs& a) {
  const TensorView& q = a.attention.q;
  check_shape(op, "w", a.w, "[T, Hi]", {q.shape[0], q.shape[1]});
  check_companion(op, "w", a.w, q.dtype);
  check_device(op, "w", a.w, q.device);
  const bool paged = given(a.attention.page_table);
  const int64_t capacity =
      a.attention.k_cache.shape[1] * (paged ? a.attention.page_table.shape[1] : 1);
  check_shape(op, "scores", a.scores, "[T, N]", {q.shape[0], capacity});
  check_dtype(op, "scores", a.scores, accumulator(q.dtype));
  check_device(op, "scores", a.scores, q.device);
  check_contiguous(op, "scores", a.scores);
}

#ifdef MEMKERNELS_WITH_CUDA
attention::Shapes check_on_cuda(const char* op, const IndexerArgs& a, const Context& ctx) {
  const attention::Shapes shapes = a.one_sequence ? attention::check_shapes(op, a.attention)
                                                  : attention::check_on_cuda(op, a.attention, ctx);
  check_arguments(op, a);
  return shapes;
}
#endif

// Stretches of keys with all queries of their sequence; with some of them where fewer tasks than
// wanted would come out.
std::vector<IndexerTask> cut_by_keys(const Problem& p, int64_t sequence, int64_t wanted) {
  std::vector<IndexerTask> tasks;
  const Sequence& s = p.sequences[sequence];
  const int64_t stretch = stretch_keys(p.dim), block = block_queries(p.group);
  const int64_t stretches = std::max<int64_t>(1, (s.kv_len + stretch - 1) / stretch);
  const int64_t parts = std::max<int64_t>(1, (wanted + stretches - 1) / stretches);
  const int64_t part = (s.num_q + parts - 1) / parts;
  const int64_t step = std::max(block, (part + block - 1) / block * block);
  for (int64_t begin = 0; begin < s.kv_len; begin += stretch) {
    for (int64_t i = 0; i < s.num_q; i += step) {
      tasks.push_back(
          {sequence, i, std::min(i + step, s.num_q), begin, std::min(begin + stretch, s.kv_len)});
    }
  }
  return tasks;
}

double multiply_adds_of(const attention::Plan& plan) {
  const Problem& p = plan.problem;
  double total = 0;
  for (const Sequence& s : plan.sequences) {
    total += static_cast<double>(s.num_q) * s.kv_len * p.num_heads * p.dim;
  }
  return total;
}

// Whether a page appears twice in the row of a sequence.
bool has_duplicates(const Problem& p, int64_t b) {
  if (p.page_table == nullptr) return false;
  std::vector<int64_t> pages;
  attention::KeyRun run;
  for (int64_t j = 0; j < p.sequences[b].kv_len; j += run.count) {
    run = attention::run_at(p, b, 0, j, p.sequences[b].kv_len - j);
    if (run.outer >= 0) pages.push_back(run.outer);
  }
  std::sort(pages.begin(), pages.end());
  return std::adjacent_find(pages.begin(), pages.end()) != pages.end();
}

struct Runner {
  const Context& ctx;
  const int workers;
  const IndexerKernel kernel;
  const size_t scratch_bytes;
  const Workspace workspace;

  Runner(const attention::Plan& plan, double multiply_adds, const Context& ctx)
      : ctx(ctx),
        workers(attention::workers_for(ctx, multiply_adds)),
        kernel(MEMKERNELS_CPU(isa_for(plan.problem.dtype), indexer_kernel)(plan.problem.dtype)),
        scratch_bytes(align_up(kernel.scratch_bytes(plan.problem))),
        workspace(allocate_workspace(workers * scratch_bytes)) {}

  template <class Step>
  void run(const std::vector<IndexerTask>& tasks, const IndexerJob& job, Step step,
           int at_once) const {
    run_tasks(ctx, at_once, static_cast<int64_t>(tasks.size()), [&](int64_t i, int worker) {
      step(job, tasks[i], static_cast<char*>(workspace.get()) + worker * scratch_bytes);
    });
  }
};

}  // namespace

void indexer_scores(const IndexerArgs& a, const Context& ctx) {
  constexpr char op[] = "indexer_scores";
#ifdef MEMKERNELS_WITH_CUDA
  if (ctx.device.type == DeviceType::cuda) {
    return cuda::indexer_scores(op, a, check_on_cuda(op, a, ctx), ctx);
  }
#endif
  attention::Plan plan;
  attention::make_plan(op, a.attention, plan);
  check_arguments(op, a);
  const Problem& p = plan.problem;
  const Runner runner(plan, multiply_adds_of(plan), ctx);
  std::vector<IndexerTask> tasks;
  for (int64_t b = 0; b < p.num_sequences; ++b) {
    const Sequence& s = p.sequences[b];
    for (const IndexerTask& task : cut_by_keys(p, b, 4 * runner.workers)) tasks.push_back(task);
    const int64_t n = a.scores.shape[1];
    for (int64_t t = s.q_begin; t < s.q_begin + s.num_q; ++t) {
      fill_scalars(a.scores.data, a.scores.dtype, t * n + s.kv_len, (t + 1) * n, -INFINITY);
    }
  }
  const IndexerJob job{&p, &a, nullptr, nullptr};
  runner.run(tasks, job, runner.kernel.forward, runner.workers);
}

void indexer_scores_backward(const IndexerArgs& a, const IndexerGrads& grads, const Context& ctx) {
  constexpr char op[] = "indexer_scores_backward";
#ifdef MEMKERNELS_WITH_CUDA
  if (ctx.device.type == DeviceType::cuda) {
    return cuda::indexer_scores_backward(op, a, grads, check_on_cuda(op, a, ctx), ctx);
  }
#endif
  attention::Plan plan;
  attention::make_plan(op, a.attention, plan);
  check_arguments(op, a);
  const Problem& p = plan.problem;
  const Runner runner(plan, 3 * multiply_adds_of(plan), ctx);
  IndexerJob job{&p, &a, &grads, nullptr};
  if (given(grads.dq) || given(grads.dw)) {
    const int64_t block = block_queries(p.group);
    std::vector<IndexerTask> tasks;
    for (int64_t b = 0; b < p.num_sequences; ++b) {
      const Sequence& s = p.sequences[b];
      for (int64_t i = 0; i < s.num_q; i += block) {
        tasks.push_back({b, i, std::min(i + block, s.num_q), 0, s.kv_len});
      }
    }
    runner.run(tasks, job, runner.kernel.queries, runner.workers);
  }
  if (!given(grads.dk)) return;
  const int64_t outers = a.attention.k_cache.shape[0];
  const int64_t dim = (p.dim + 31) / 32 * 32;  // as padded by any instruction set, at most
  const size_t bytes = outers * p.page_size * dim * (p.dtype == Dtype::f64 ? 8 : 4);
  const Workspace sums = allocate_workspace(bytes);
  std::memset(sums.get(), 0, bytes);
  job.dk = sums.get();
  // Sequences one after another: they may share pages.
  for (int64_t b = 0; b < p.num_sequences; ++b) {
    runner.run(cut_by_keys(p, b, 1), job, runner.kernel.keys,
               has_duplicates(p, b) ? 1 : runner.workers);
  }
  run_tasks(ctx, runner.workers, outers,
            [&](int64_t outer, int) { runner.kernel.finish_keys(job, outer); });
}

}  // namespace memkernels::selection
