#include "lookup/row_update.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "core/check.h"
#include "core/cuda/host_copy.h"

namespace memkernels::lookup {

namespace {

// A tensor whose rows are written by different workers.
void check_table(const char* op, const char* arg, const TensorView& t, const TensorView& param) {
  check_device(op, arg, t, param.device);
  if (t.ndim == 2) check_rows_contiguous(op, arg, t);
  const int64_t width = t.ndim == 2 ? t.shape[1] : 1;
  check(t.shape[0] <= 1 || t.stride[0] >= width, op, arg, " has rows that overlap");
}

void check_state(const char* op, const char* arg, const TensorView& t, const TensorView& param) {
  check_shape(op, arg, t, "[N, D]", {param.shape[0], param.shape[1]});
  check_companion(op, arg, t, param.dtype);
  check_table(op, arg, t, param);
}

std::vector<int64_t> checked_rows(const char* op, const RowUpdateArgs& a) {
  const int64_t count = index_at(a.count, 0), num_rows = a.param.shape[0];
  check(count >= 0 && count <= a.rows.shape[0], op, "count must be 0 to ", a.rows.shape[0],
        ", the size of rows, got ", count);
  std::vector<int64_t> rows(count);
  bool rising = true;
  int64_t last = -1;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = index_at(a.rows, i * a.rows.stride[0]);
    check(row >= -1 && row < num_rows, op, "rows[", i, "] = ", row, " is outside [-1, ", num_rows,
          ")");
    rows[i] = row;
    if (row < 0) continue;
    rising = rising && row > last;
    last = row;
  }
  if (!rising) {
    std::vector<int64_t> sorted = rows;
    std::sort(sorted.begin(), sorted.end());
    const auto first = std::lower_bound(sorted.begin(), sorted.end(), 0);
    const auto twice = std::adjacent_find(first, sorted.end());
    check(twice == sorted.end(), op, "rows has row ", twice == sorted.end() ? 0 : *twice, " twice");
  }
  return rows;
}

}  // namespace

void row_update(const char* op, const RowUpdateArgs& a, const Context& ctx) {
  check_floating(op, "param", a.param);
  check_shape(op, "param", a.param, "[N, D]", {-1, -1});
  const int64_t num_rows = a.param.shape[0], dim = a.param.shape[1];
  check(dim > 0, op, "param has dimension D of 0");
  check_table(op, "param", a.param, a.param);
  if (a.optimiser == Optimiser::adagrad) {
    const bool alike = (a.first.ndim == 1 || (a.first.ndim == 2 && a.first.shape[1] == dim)) &&
                       a.first.shape[0] == num_rows;
    check(alike, op, "sum must be [N, D] or [N] beside param ", shape_of(a.param), ", got ",
          shape_of(a.first));
    check_dtype(op, "sum", a.first, accumulator(a.param.dtype));
    check_table(op, "sum", a.first, a.param);
  }
  if (a.optimiser == Optimiser::adam) {
    check_state(op, "exp_avg", a.first, a.param);
    check_state(op, "exp_avg_sq", a.second, a.param);
    check(a.step >= 1, op, "step must be at least 1, got ", a.step);
    const bool decays = a.beta1 >= 0 && a.beta1 < 1 && a.beta2 >= 0 && a.beta2 < 1;
    check(decays, op, "betas must be at least 0 and below 1, got (", a.beta1, ", ", a.beta2, ")");
  }
  check_shape(op, "rows", a.rows, "[M]", {-1});
  check_index(op, "rows", a.rows);
  check_device(op, "rows", a.rows, a.param.device);
  check_shape(op, "grads", a.grads, "[M, D]", {a.rows.shape[0], dim});
  check_dtype(op, "grads", a.grads, accumulator(a.param.dtype));
  check_device(op, "grads", a.grads, a.param.device);
  check_rows_contiguous(op, "grads", a.grads);
  check_shape(op, "count", a.count, "one entry", {1});
  check_index(op, "count", a.count);
  check_device(op, "count", a.count, a.param.device);
  const bool adagrad = a.optimiser == Optimiser::adagrad;
  const std::pair<const char*, const TensorView*> arguments[] = {
      {"param", &a.param},       {adagrad ? "sum" : "exp_avg", &a.first},
      {"exp_avg_sq", &a.second}, {"rows", &a.rows},
      {"grads", &a.grads},       {"count", &a.count}};
  constexpr int kWritten = 3;
  for (int i = 0; i < kWritten; ++i) {
    for (int j = i + 1; j < 6; ++j) {
      check_apart(op, arguments[i].first, *arguments[i].second, arguments[j].first,
                  *arguments[j].second);
    }
  }
#ifdef MEMKERNELS_WITH_CUDA
  if (ctx.device.type == DeviceType::cuda) {
    if (ctx.check_indices) {
      HostCopies copies(op, ctx);
      RowUpdateArgs read = a;
      copies.replace(read.rows);
      copies.replace(read.count);
      checked_rows(op, read);
    }
    return cuda::row_update(op, a, ctx);
  }
#endif
  const std::vector<int64_t> rows = checked_rows(op, a);

  const Isa isa = isa_for(a.param.dtype);
  const RowUpdateKernel kernel = MEMKERNELS_CPU(isa, row_update_kernel)(a);
  const int64_t count = static_cast<int64_t>(rows.size());
  const int64_t per_task = std::max<int64_t>(1, 32768 / dim);
  const int64_t num_tasks = (count + per_task - 1) / per_task;
  run_tasks(ctx, num_tasks > 2 ? ctx.num_workers : 1, num_tasks, [&](int64_t task, int) {
    kernel(a, rows.data(), task * per_task, std::min(count, (task + 1) * per_task));
  });
}

}  // namespace memkernels::lookup
