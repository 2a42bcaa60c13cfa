#include "selection/select.h"

#include <algorithm>

#include "core/check.h"
#include "core/cuda/host_copy.h"
#include "core/memory.h"

namespace memkernels::selection {

namespace {

// Where row r begins in a tensor, by its leading dimensions of the given sizes.
int64_t row_offset(const TensorView& t, int leading, const int64_t* sizes, int64_t r) {
  int64_t offset = 0;
  for (int i = leading - 1; i >= 0; --i) {
    offset += r % sizes[i] * t.stride[i];
    r /= sizes[i];
  }
  return offset;
}

// Rows of `scores` by its leading dimensions; per_row(r, row) completes what is particular to one.
template <class PerRow>
void select_rows(const TensorView& scores, const TensorView& out, const SelectRow& like,
                 const Context& ctx, const PerRow& per_row) {
  const int leading = scores.ndim - 1;
  const int64_t n = scores.shape[leading], room = out.shape[leading];
  int64_t rows = 1;
  for (int i = 0; i < leading; ++i) rows *= scores.shape[i];
  if (rows == 0 || room == 0) return;
  const Isa isa = isa_for(scores.dtype);
  const SelectKernel kernel = MEMKERNELS_CPU(isa, select_kernel)(scores.dtype);
  const int64_t row_work = n + 4 * room;
  const int64_t per_task = std::max<int64_t>(1, 8192 / std::max<int64_t>(1, row_work));
  const int64_t num_tasks = (rows + per_task - 1) / per_task;
  const int workers = rows * row_work > 32768 ? ctx.num_workers : 1;
  SelectRow largest = like;
  largest.length = n;
  largest.k = largest.room = room;
  const size_t scratch_bytes = align_up(kernel.scratch_bytes(largest));
  const Workspace workspace = allocate_workspace(workers * scratch_bytes);
  run_tasks(ctx, workers, num_tasks, [&](int64_t task, int worker) {
    const int64_t end = std::min(rows, (task + 1) * per_task);
    for (int64_t r = task * per_task; r < end; ++r) {
      SelectRow row = largest;
      row.scores = static_cast<const char*>(scores.data) +
                   row_offset(scores, leading, scores.shape, r) * item_size(scores.dtype);
      row.out = static_cast<int32_t*>(out.data) + r * room;
      per_row(r, row);
      kernel.run(row, static_cast<char*>(workspace.get()) + worker * scratch_bytes);
    }
  });
}

void check_scores(const char* op, const char* arg, const TensorView& scores) {
  check(scores.ndim >= 1, op, arg, " must have a dimension to select from");
  check_floating(op, arg, scores);
  check_rows_contiguous(op, arg, scores);
  const int64_t n = scores.shape[scores.ndim - 1];
  check(n <= INT32_MAX, op, arg, " has ", n, " entries a row, more than int32 can name");
}

void check_kept(const char* op, int64_t keep_first, int64_t keep_last) {
  check(keep_first >= 0, op, "keep_first must not be negative, got ", keep_first);
  check(keep_last >= 0, op, "keep_last must not be negative, got ", keep_last);
}

int64_t length_of(const SelectArgs& a, int64_t row) {
  const int leading = a.scores.ndim - 1;
  if (!given(a.lengths)) return a.scores.shape[leading];
  return index_at(a.lengths, row_offset(a.lengths, leading, a.scores.shape, row));
}

void check_lengths(const char* op, const SelectArgs& a) {
  if (!given(a.lengths)) return;
  const int64_t rows = numel(a.lengths), n = a.scores.shape[a.scores.ndim - 1];
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t length = length_of(a, r);
    check(length >= 0 && length <= n, op, "lengths has ", length, " in row ", r, ", outside [0, ",
          n, "]");
  }
}

int64_t length_of(const EvictArgs& a, int64_t b) {
  return index_at(a.seq_lens, b * a.seq_lens.stride[0]);
}

int64_t budget_of(const EvictArgs& a, int64_t b) {
  return given(a.budgets) ? index_at(a.budgets, b * a.budgets.stride[0]) : a.keep.shape[2];
}

void check_budgets(const char* op, const EvictArgs& a) {
  const int64_t batch = a.stats.shape[0], heads = a.stats.shape[1], most = a.stats.shape[2];
  const int64_t room = a.keep.shape[2];
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = length_of(a, b), budget = budget_of(a, b);
    check(length >= 0 && length <= most, op, "seq_lens[", b, "] = ", length, " is outside [0, ",
          most, "], the tokens of stats");
    check(budget >= 0, op, "budget[", b, "] = ", budget, " is negative");
    check(budget <= room || room >= most, op, "budget[", b, "] = ", budget,
          " exceeds max_budget = ", room);
    check(length <= budget || (a.keep_first <= budget && a.keep_last <= budget - a.keep_first), op,
          "budget ", budget, " is less than keep_first + keep_last = ", a.keep_first, " + ",
          a.keep_last);
    for (int64_t h = 0; h < heads && given(a.num_protected); ++h) {
      const int64_t protects =
          index_at(a.num_protected, b * a.num_protected.stride[0] + h * a.num_protected.stride[1]);
      check(length <= budget || protects <= budget, op, "pinned: ", protects,
            " tokens of sequence ", b, " are protected, its budget is ", budget);
    }
  }
}

}  // namespace

void select_topk(const SelectArgs& a, const Context& ctx) {
  constexpr char op[] = "select_topk";
  check_scores(op, "scores", a.scores);
  const int leading = a.scores.ndim - 1;
  const int64_t k = a.out.shape[leading];
  check_kept(op, a.keep_first, a.keep_last);
  check(a.keep_first <= k && a.keep_last <= k - a.keep_first, op,
        "keep_first + keep_last = ", a.keep_first, " + ", a.keep_last, " exceeds k = ", k);
  check(a.threshold == a.threshold, op, "threshold must not be NaN");
  if (given(a.lengths)) {
    check_index(op, "lengths", a.lengths);
    check_device(op, "lengths", a.lengths, a.scores.device);
    check(a.lengths.ndim == leading &&
              std::equal(a.lengths.shape, a.lengths.shape + leading, a.scores.shape),
          op, "lengths must be ", Sizes{a.scores.shape, leading}, ", as scores but for its last ",
          "dimension, got ", shape_of(a.lengths));
  }
#ifdef MEMKERNELS_WITH_CUDA
  if (ctx.device.type == DeviceType::cuda) {
    if (ctx.check_indices) {
      HostCopies copies(op, ctx);
      SelectArgs read = a;
      copies.replace(read.lengths);
      check_lengths(op, read);
    }
    return cuda::select_topk(a, ctx);
  }
#endif
  check_lengths(op, a);
  SelectRow like{};
  like.keep_first = a.keep_first;
  like.keep_last = a.keep_last;
  like.lowest = a.threshold;
  select_rows(a.scores, a.out, like, ctx,
              [&](int64_t r, SelectRow& row) { row.length = length_of(a, r); });
}

void evict(const EvictArgs& a, const Context& ctx) {
  constexpr char op[] = "evict";
  check_scores(op, "stats", a.stats);
  check(a.stats.ndim == 3, op, "stats must be [B, Hkv, L], got ", shape_of(a.stats));
  const int64_t batch = a.stats.shape[0], heads = a.stats.shape[1];
  check_kept(op, a.keep_first, a.keep_last);
  check_shape(op, "seq_lens", a.seq_lens, "[B]", {batch});
  check_index(op, "seq_lens", a.seq_lens);
  check_device(op, "seq_lens", a.seq_lens, a.stats.device);
  if (given(a.budgets)) {
    check_shape(op, "budget", a.budgets, "[B]", {batch});
    check_index(op, "budget", a.budgets);
    check_device(op, "budget", a.budgets, a.stats.device);
  }
  if (given(a.num_protected)) {
    check_shape(op, "num_protected", a.num_protected, "[B, Hkv]", {batch, heads});
    check_index(op, "num_protected", a.num_protected);
    check_device(op, "num_protected", a.num_protected, a.stats.device);
  }
#ifdef MEMKERNELS_WITH_CUDA
  if (ctx.device.type == DeviceType::cuda) {
    if (ctx.check_indices) {
      HostCopies copies(op, ctx);
      EvictArgs read = a;
      for (TensorView* t : {&read.seq_lens, &read.budgets, &read.num_protected}) copies.replace(*t);
      check_budgets(op, read);
    }
    return cuda::evict(a, ctx);
  }
#endif
  check_budgets(op, a);
  SelectRow like{};
  like.keep_first = a.keep_first;
  like.keep_last = a.keep_last;
  like.any = true;
  select_rows(a.stats, a.keep, like, ctx, [&](int64_t r, SelectRow& row) {
    row.length = length_of(a, r / heads);
    row.k = std::min(budget_of(a, r / heads), row.room);
  });
}

}  // namespace memkernels::selection
