#include "selection/select.h"

#include <algorithm>

#include "selection/select_kernel.cuh"

namespace memkernels::selection::cuda {

namespace {

// Everything but lengths, budgets and what may be selected.
SelectParams params_of(const char* op, const TensorView& scores, const TensorView& out,
                       int64_t keep_first, int64_t keep_last) {
  SelectParams p{};
  p.scores = scores.data;
  p.leading = scores.ndim - 1;
  p.rows = 1;
  for (int i = 0; i < p.leading; ++i) {
    p.sizes[i] = scores.shape[i];
    p.strides[i] = scores.stride[i];
    p.rows *= scores.shape[i];
  }
  const int64_t n = scores.shape[p.leading], room = out.shape[p.leading];
  constexpr int64_t kMost = 0x7fffffff - kMaxThreads;  // that threads can step over
  check(n <= kMost && room <= kMost, op, n, " entries a row, of which ", room,
        " are wanted, exceed what a CUDA launch takes");
  p.n = static_cast<int>(n);
  p.room = static_cast<int>(room);
  p.keep_first = static_cast<int>(std::min<int64_t>(keep_first, p.n));
  p.keep_last = static_cast<int>(std::min<int64_t>(keep_last, p.n));
  p.out = static_cast<int32_t*>(out.data);
  return p;
}

Integers leading_integers(const TensorView& t) {
  return given(t) ? Integers{t.data, 0, t.dtype == Dtype::i64} : Integers{};
}

void run(const char* op, Dtype dtype, SelectParams p, const Context& ctx) {
  if (p.rows == 0 || p.room == 0) return;
  const DeviceGuard guard(op, ctx.device);
  constexpr int64_t kFixed = kFixedInts * sizeof(int);
  // A long row has several blocks where there are not rows for all of the GPU.
  const bool shared = p.n > 2 * kPartLength && p.rows < limits_of(op, ctx.device).multiprocessors;
  p.parts = shared ? static_cast<int>(ceil_div(p.n, kPartLength)) : 1;
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    if (!shared) {
      const bool cached = p.n <= kCachedKeys;
      const int threads = p.n <= 1024 ? kShortThreads : p.n <= 4096 ? 512 : kMaxThreads;
      return launch(op, ctx, select<T>, p.rows, threads, kFixed + (cached ? p.n * 4 : 0), p,
                    cached);
    }
    const int64_t bytes = kPasses * p.rows * kDigits * sizeof(int);
    p.digits = static_cast<int*>(ctx.allocate(ctx, bytes));
    p.counts = static_cast<Count*>(ctx.allocate(ctx, p.rows * p.parts * sizeof(Count)));
    clear(op, ctx, p.digits, bytes);
    const int64_t blocks = p.rows * p.parts;
    for (int pass = 0; pass < kPasses; ++pass) {
      launch(op, ctx, count_digits<T>, blocks, kMaxThreads, kFixed, p, pass);
    }
    launch(op, ctx, count_parts<T>, blocks, kMaxThreads, kFixed, p);
    launch(op, ctx, write_parts<T>, blocks, kMaxThreads, kFixed, p);
  });
}

}  // namespace

void select_topk(const SelectArgs& a, const Context& ctx) {
  constexpr char op[] = "select_topk";
  check_supported(op, "scores", a.scores);
  SelectParams p = params_of(op, a.scores, a.out, a.keep_first, a.keep_last);
  p.lengths = leading_integers(a.lengths);
  std::copy_n(a.lengths.stride, kMaxDims - 1, p.length_strides);
  p.lowest = static_cast<float>(a.threshold);
  run(op, a.scores.dtype, p, ctx);
}

void evict(const EvictArgs& a, const Context& ctx) {
  constexpr char op[] = "evict";
  check_supported(op, "stats", a.stats);
  SelectParams p = params_of(op, a.stats, a.keep, a.keep_first, a.keep_last);
  p.lengths = leading_integers(a.seq_lens);
  p.length_strides[0] = a.seq_lens.stride[0];
  p.budgets = leading_integers(a.budgets);
  p.budget_strides[0] = a.budgets.stride[0];
  p.any = true;
  run(op, a.stats.dtype, p, ctx);
}

}  // namespace memkernels::selection::cuda
