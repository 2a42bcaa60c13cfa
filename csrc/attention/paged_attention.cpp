#include "attention/paged_attention.h"

#include <algorithm>

#include "attention/paged_attention_cpu.h"
#include "attention/plan.h"
#include "attention/shared_prefix.h"
#include "core/check.h"
#include "core/memory.h"

namespace memkernels::attention {

namespace {

// Split length for a row: 256 * 2^n, the smallest that gives at most 32 splits of its own length.
int64_t split_length(int64_t kv_len) {
  int64_t length = 256;
  while (length * 32 < kv_len) length *= 2;
  return length;
}

// Everything that rounding depends on follows from the sequence alone, so that no other sequence,
// and no number of workers, ever changes a bit of its result.
std::vector<SequenceTasks> cut_sequences(const Problem& p) {
  std::vector<SequenceTasks> tasks(p.num_sequences);
  for (int64_t b = 0; b < p.num_sequences; ++b) {
    const Sequence& s = p.sequences[b];
    SequenceTasks& t = tasks[b];
    t.block_queries = std::max<int64_t>(1, kBlockRows / p.group);
    t.num_blocks = (s.num_q + t.block_queries - 1) / t.block_queries;
    t.split_len = split_length(s.kv_len);
    t.num_splits =
        t.num_blocks == 1 ? std::max<int64_t>(1, (s.kv_len + t.split_len - 1) / t.split_len) : 1;
  }
  return tasks;
}

// Tasks of all heads of a sequence.
int64_t parts_of(const SequenceTasks& t) {
  return t.one_task ? t.num_blocks : t.num_splits - t.shared_splits;
}

// Enough tasks to keep all workers busy, no more partial states than that takes.
void cut_tasks(const Problem& p, int64_t workers, std::vector<SequenceTasks>& tasks,
               ForwardJob& job, int64_t& num_partials) {
  const auto work_of = [&](int64_t b) {
    return static_cast<double>(p.sequences[b].num_q) * p.sequences[b].kv_len;
  };
  double work = 0;
  for (int64_t b = 0; b < p.num_sequences; ++b) work += work_of(b);
  int64_t parts = 0;
  for (int64_t b = 0; b < p.num_sequences; ++b) {
    const bool small = 4 * workers * work_of(b) <= work;
    tasks[b].one_task = tasks[b].num_splits == 1 || (small && tasks[b].shared_splits == 0);
    parts += parts_of(tasks[b]);
  }
  // Heads of one token lie side by side (NHD) or apart (HND). Side by side, a task takes several,
  // to read whole pages; but never so many that workers are left without a task, and only heads
  // that see the same keys.
  const bool same_keys = p.same_window && p.indices.head_stride == 0;
  const bool together = p.k.head_stride < p.k.token_stride && same_keys;
  for (int64_t b = 0; b < p.num_sequences; ++b) {
    const Sequence& s = p.sequences[b];
    SequenceTasks& t = tasks[b];
    const int64_t rows = std::max<int64_t>(1, s.num_q * p.group);
    int64_t heads = together && t.num_blocks == 1 ? std::max<int64_t>(1, kBlockRows / rows) : 1;
    heads = std::min(heads, p.num_kv_heads);
    while (heads > 1 && parts * ((p.num_kv_heads + heads - 1) / heads) < 4 * workers) {
      heads = (heads + 1) / 2;
    }
    t.heads_per_task = heads;
    t.head_groups = (p.num_kv_heads + heads - 1) / heads;
    t.first_task = job.num_tasks;
    job.num_tasks += parts_of(t) * t.head_groups;
    t.first_partial = num_partials;
    if (!t.one_task) num_partials += t.num_splits * s.num_q * p.num_heads;
  }
}

}  // namespace

void paged_attention(const PagedAttentionArgs& args, const Context& ctx) {
  const char* const op = given(args.indices) ? "gather_attention" : "paged_attention";
#ifdef MEMKERNELS_WITH_CUDA
  if (ctx.device.type == DeviceType::cuda) {
    return cuda::paged_attention(op, args, check_on_cuda(op, args, ctx), ctx);
  }
#endif
  Plan plan;
  make_plan(op, args, plan);
  const Problem& p = plan.problem;
  if (plan.total_q == 0 || p.num_heads == 0) return;

  double multiply_adds = 0;
  for (const Sequence& s : plan.sequences) {
    multiply_adds += static_cast<double>(s.num_q) * s.kv_len * p.num_heads * (p.dim + p.dim_v);
  }
  const int workers = workers_for(ctx, multiply_adds);

  std::vector<SequenceTasks> tasks = cut_sequences(p);
  const SharedPrefixes prefixes = find_shared_prefixes(p, tasks);
  ForwardJob job{};
  job.problem = &p;
  job.tasks = tasks.data();
  job.shared = prefixes.splits.data();
  job.num_shared = static_cast<int64_t>(prefixes.splits.size());
  job.members = prefixes.order.data();
  job.num_tasks = job.num_shared * p.num_kv_heads;
  int64_t num_partials = 0;
  cut_tasks(p, workers, tasks, job, num_partials);

  const Isa isa = isa_for(p.dtype);
  const ForwardKernel kernel = MEMKERNELS_CPU(isa, forward_kernel)(p.dtype);
  int64_t max_rows = 0, max_heads = 0;
  for (int64_t b = 0; b < p.num_sequences; ++b) {
    max_rows = std::max(max_rows, std::min(p.sequences[b].num_q, tasks[b].block_queries) * p.group);
    max_heads = std::max(max_heads, tasks[b].heads_per_task);
  }
  const size_t accumulator = p.dtype == Dtype::f64 ? 8 : 4;
  size_t scratch_bytes = align_up(kernel.scratch_bytes(p, max_rows, max_heads));
  if (job.num_shared > 0) {
    const int64_t rows = std::max(max_rows, kBlockRows);
    scratch_bytes = std::max(scratch_bytes, align_up(kernel.scratch_bytes(p, rows, 1)));
  }
  const size_t partial_bytes = num_partials * partial_size(p.dim_v) * accumulator;
  const Workspace workspace = allocate_workspace(workers * scratch_bytes + partial_bytes);
  char* scratch = static_cast<char*>(workspace.get());
  job.partials = scratch + workers * scratch_bytes;

  run_tasks(ctx, workers, job.num_tasks, [&](int64_t task, int worker) {
    kernel.run(job, task, scratch + worker * scratch_bytes);
  });
  if (num_partials == 0) return;
  // Each merge reads its splits' states once: little work, but not for one core alone.
  run_tasks(ctx, workers_for(ctx, static_cast<double>(num_partials) * p.dim_v), plan.total_q,
            [&](int64_t token, int) {
              const int64_t b = sequence_of(plan, token);
              if (!tasks[b].one_task) kernel.merge(job, b, token - p.sequences[b].q_begin);
            });
}

}  // namespace memkernels::attention
