#include "selection/attention_colstats.h"

#include <algorithm>
#include <vector>

#include "attention/plan.h"
#include "core/check.h"
#include "core/memory.h"
#include "selection/stretch.h"

namespace memkernels::selection {

namespace {

// Beside checked inputs of so many sequences.
void check_stats(const char* op, const ColstatsArgs& a, int64_t batch) {
  const attention::PagedAttentionArgs& inputs = a.attention;
  const Device device = inputs.q.device;
  const int64_t total_q = inputs.q.shape[0], heads = inputs.q.shape[1];
  check(heads > 0, op, "q has no heads");
  const Dtype wide = accumulator(inputs.q.dtype);
  check_shape(op, "lse", inputs.lse, "[total_q, Hq]", {total_q, heads});
  check_dtype(op, "lse", inputs.lse, wide);
  check_device(op, "lse", inputs.lse, device);
  check_shape(op, "accumulate_into", a.stats, "[B, Hkv, Lmax]",
              {batch, inputs.k_cache.shape[2], -1});
  check_dtype(op, "accumulate_into", a.stats, wide);
  check_device(op, "accumulate_into", a.stats, device);
  check_contiguous(op, "accumulate_into", a.stats);
  const int64_t capacity = given(inputs.page_table)
                               ? inputs.page_table.shape[1] * inputs.k_cache.shape[1]
                               : inputs.k_cache.shape[1];
  check(a.stats.shape[2] >= capacity, op, "accumulate_into has room for ", a.stats.shape[2],
        " tokens, the cache for ", capacity);
}

}  // namespace

void attention_colstats(const char* op, const ColstatsArgs& a, const Context& ctx) {
  const attention::PagedAttentionArgs& inputs = a.attention;
#ifdef MEMKERNELS_WITH_CUDA
  if (ctx.device.type == DeviceType::cuda) {
    const attention::Shapes shapes = attention::check_on_cuda(op, inputs, ctx);
    check_stats(op, a, shapes.batch);
    return cuda::attention_colstats(op, a, shapes, ctx);
  }
#endif
  attention::Plan plan;
  attention::make_plan(op, inputs, plan);
  const attention::Problem& p = plan.problem;
  check_stats(op, a, p.num_sequences);

  // Heads of one token that lie side by side are read together, if they see the same keys.
  const bool together = p.k.head_stride < p.k.token_stride && p.same_window;
  const int64_t keys = stretch_keys(p.dim);
  std::vector<ColstatsTask> tasks;
  double multiply_adds = 0;
  for (int64_t b = 0; b < p.num_sequences; ++b) {
    const attention::Sequence& s = p.sequences[b];
    multiply_adds += static_cast<double>(s.num_q) * s.kv_len * p.num_heads * p.dim;
    const bool few = s.num_q * p.group <= kFewRows;
    const int64_t heads = together && few ? p.num_kv_heads : 1;
    for (int64_t begin = 0; begin < s.kv_len; begin += keys) {
      for (int64_t h = 0; h < p.num_kv_heads; h += heads) {
        tasks.push_back({b, begin, std::min(begin + keys, s.kv_len), h, h + heads});
      }
    }
  }
  const int workers = attention::workers_for(ctx, multiply_adds);
  const Isa isa = isa_for(p.dtype);
  const ColstatsKernel kernel = MEMKERNELS_CPU(isa, colstats_kernel)(p.dtype);
  const size_t scratch_bytes = align_up(kernel.scratch_bytes(p));
  const Workspace workspace = allocate_workspace(workers * scratch_bytes);
  const ColstatsJob job{&p, &a};
  run_tasks(ctx, workers, static_cast<int64_t>(tasks.size()), [&](int64_t i, int worker) {
    kernel.run(job, tasks[i], static_cast<char*>(workspace.get()) + worker * scratch_bytes);
  });
}

}  // namespace memkernels::selection
