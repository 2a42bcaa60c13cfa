#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention/paged_attention.h"
#include "attention/paged_attention_backward_cpu.h"
#include "attention/paged_attention_cpu.h"
#include "attention/plan.h"
#include "core/check.h"
#include "core/memory.h"

namespace memkernels::attention {

namespace {

// Keys a task: 2048 * 2^n, the smallest that gives at most 8 chunks, so that one long sequence
// keeps several cores busy at the price of at most 8 partial dq.
int64_t chunk_length(int64_t kv_len) {
  int64_t length = 2048;
  while (length * 8 < kv_len) length *= 2;
  return length;
}

// Rows of a block, padded to whole tiles of every instruction set (6 and 8 rows).
constexpr int64_t kRowPadding = 24;

std::vector<BackwardTasks> cut(const Problem& p, BackwardJob& job, int64_t& dq_size) {
  std::vector<BackwardTasks> tasks(p.num_sequences);
  for (int64_t b = 0; b < p.num_sequences; ++b) {
    const Sequence& s = p.sequences[b];
    BackwardTasks& t = tasks[b];
    t.chunk_len = chunk_length(s.kv_len);
    t.num_chunks = std::max<int64_t>(1, (s.kv_len + t.chunk_len - 1) / t.chunk_len);
    t.block_queries = std::clamp<int64_t>(kBlockRows / p.group, 1, std::max<int64_t>(1, s.num_q));
    t.num_blocks = (s.num_q + t.block_queries - 1) / t.block_queries;
    t.block_rows = (t.block_queries * p.group + kRowPadding - 1) / kRowPadding * kRowPadding;
    t.first_task = job.num_tasks;
    job.num_tasks += t.num_chunks * p.num_kv_heads;
    t.first_dq = dq_size;
    dq_size += t.num_chunks * p.num_kv_heads * t.num_blocks * t.block_rows * padded_dim(p.dim);
  }
  job.tasks = tasks.data();
  return tasks;
}

// Slot of every page (or row of contiguous K and V) that one head reads more than once, -1 for the
// others; empty if there is none.
std::vector<int32_t> shared_pages(const Problem& p, int64_t num_pages, int64_t& num_shared) {
  std::vector<int32_t> slot;
  if (p.page_table == nullptr && p.indices.data == nullptr) return slot;
  const int64_t lists = p.indices.head_stride == 0 ? 1 : p.num_kv_heads;
  for (int64_t head = 0; head < lists; ++head) {
    std::vector<bool> used(num_pages);
    for (int64_t b = 0; b < p.num_sequences; ++b) {
      KeyRun run;
      for (int64_t j = 0; j < p.sequences[b].kv_len; j += run.count) {
        run = run_at(p, b, head, j, p.sequences[b].kv_len - j);
        if (run.outer < 0) continue;
        if (!used[run.outer]) {
          used[run.outer] = true;
          continue;
        }
        if (slot.empty()) slot.assign(num_pages, -1);
        if (slot[run.outer] < 0) slot[run.outer] = static_cast<int32_t>(num_shared++);
      }
    }
  }
  return slot;
}

void sink_gradient(const Problem& p, const BackwardJob& job, int64_t total_q,
                   const TensorView& dsink) {
  const auto at = [&](const void* data, int64_t i) { return load_scalar(data, p.lse.dtype, i); };
  for (int64_t h = 0; h < p.num_heads; ++h) {
    double total = 0;
    for (int64_t t = 0; t < total_q; ++t) {
      const double lse = at(p.lse.data, t * p.lse.token_stride + h * p.lse.head_stride);
      if (lse == -INFINITY) continue;
      total -= std::exp(p.sink_logit[h] - lse) * at(job.delta, t * p.num_heads + h);
    }
    store_scalar(dsink.data, dsink.dtype, h * dsink.stride[0], total);
  }
}

// What the forward returned, and the gradients of that.
void check_results(const char* op, const PagedAttentionArgs& args, const PagedAttentionGrads& grads,
                   const Shapes& shapes) {
  const Dtype dtype = args.q.dtype, wide = accumulator(dtype);
  for (const auto& [arg, t] : {std::pair{"dout", &grads.dout}, {"out", &args.out}}) {
    check_shape(op, arg, *t, "[total_q, Hq, Dv]", {shapes.total_q, shapes.heads, shapes.dim_v});
    check_dtype(op, arg, *t, dtype);
    check_rows_contiguous(op, arg, *t);
  }
  if (args.out.device.type == DeviceType::cuda) check_contiguous(op, "out", args.out);
  for (const auto& [arg, t] : {std::pair{"dlse", &grads.dlse}, {"lse", &args.lse}}) {
    if (!given(*t)) continue;
    check_shape(op, arg, *t, "[total_q, Hq]", {shapes.total_q, shapes.heads});
    check_dtype(op, arg, *t, wide);
    check_contiguous(op, arg, *t);
  }
}

}  // namespace

void paged_attention_backward(const PagedAttentionArgs& args, const PagedAttentionGrads& grads,
                              const Context& ctx) {
  const char* op = given(args.indices) ? "gather_attention_backward" : "paged_attention_backward";
#ifdef MEMKERNELS_WITH_CUDA
  if (ctx.device.type == DeviceType::cuda) {
    const Shapes shapes = check_on_cuda(op, args, ctx);
    check_results(op, args, grads, shapes);
    return cuda::paged_attention_backward(op, args, grads, shapes, ctx);
  }
#endif
  check_results(op, args, grads, check_shapes(op, args));
  Plan plan;
  make_plan(op, args, plan);
  const Problem& p = plan.problem;
  const int64_t total_q = plan.total_q;
  if (total_q == 0 || p.num_heads == 0) return;

  const int leading = p.packed ? 2 : 3;
  BackwardJob job{};
  job.problem = &p;
  job.dout = rows_of(grads.dout, 2);
  job.dq = rows_of(grads.dq, 2);
  job.dk = rows_of(grads.dk_cache, leading);
  job.dv = rows_of(grads.dv_cache, leading);
  job.dkey_bias = rows_of(grads.dkey_bias, leading);
  job.dlse = grads.dlse.data;
  int64_t dq_size = 0;
  const std::vector<BackwardTasks> tasks = cut(p, job, dq_size);
  job.num_pages = args.k_cache.shape[0];
  const std::vector<int32_t> slots = shared_pages(p, job.num_pages, job.num_shared);
  if (!slots.empty()) {
    job.shared_slot = slots.data();
    job.num_tasks = p.num_kv_heads;
  }

  double multiply_adds = 0;
  int64_t block_rows = 0;
  for (int64_t b = 0; b < p.num_sequences; ++b) {
    const Sequence& s = p.sequences[b];
    multiply_adds += 2.5 * s.num_q * s.kv_len * p.num_heads * (p.dim + p.dim_v);
    block_rows = std::max(block_rows, tasks[b].block_rows);
  }
  const int workers = workers_for(ctx, multiply_adds);

  const Isa isa = isa_for(p.dtype);
  const BackwardKernel kernel = MEMKERNELS_CPU(isa, backward_kernel)(p.dtype);
  const size_t accumulator = p.dtype == Dtype::f64 ? 8 : 4;
  const size_t scratch_bytes = align_up(kernel.scratch_bytes(p, block_rows));
  const size_t delta_bytes = align_up(total_q * p.num_heads * accumulator);
  const size_t dq_bytes = job.dq.data ? align_up(dq_size * accumulator) : 0;
  const int64_t shared_rows = job.num_shared * p.page_size * p.num_kv_heads;
  const size_t shared_dk = align_up(shared_rows * padded_dim(p.dim) * accumulator);
  const size_t shared_dv = align_up(shared_rows * padded_dim(p.dim_v) * accumulator);
  const size_t shared_bytes = shared_dk + shared_dv + align_up(shared_rows * accumulator);
  const Workspace workspace =
      allocate_workspace(workers * scratch_bytes + delta_bytes + dq_bytes + shared_bytes);
  char* scratch = static_cast<char*>(workspace.get());
  char* rest = scratch + workers * scratch_bytes;
  job.delta = rest;
  job.dq_chunks = rest + delta_bytes;
  job.shared_dk = rest + delta_bytes + dq_bytes;
  job.shared_dv = static_cast<char*>(job.shared_dk) + shared_dk;
  job.shared_bias = static_cast<char*>(job.shared_dv) + shared_dv;
  std::memset(job.shared_dk, 0, shared_bytes);

  const int token_workers = workers_for(ctx, 2.0 * total_q * p.num_heads * p.dim_v);
  run_tasks(ctx, token_workers, total_q, [&](int64_t token, int) { kernel.delta(job, token); });
  if (given(grads.dsink_logit)) sink_gradient(p, job, total_q, grads.dsink_logit);
  if (job.dq.data || job.dk.data || job.dv.data || job.dkey_bias.data) {
    run_tasks(ctx, workers, job.num_tasks, [&](int64_t task, int worker) {
      kernel.run(job, task, scratch + worker * scratch_bytes);
    });
  }
  if (job.shared_slot != nullptr) {
    run_tasks(ctx, workers, p.num_kv_heads,
              [&](int64_t head, int) { kernel.finish_shared(job, head); });
  }
  if (job.dq.data) {
    run_tasks(ctx, token_workers, total_q, [&](int64_t token, int) {
      const int64_t b = sequence_of(plan, token);
      kernel.finish_query(job, b, token - p.sequences[b].q_begin);
    });
  }
}

}  // namespace memkernels::attention
