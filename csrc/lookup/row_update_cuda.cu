#include <algorithm>
#include <cmath>

#include "lookup/row_update.h"
#include "lookup/row_update_kernel.cuh"

namespace memkernels::lookup::cuda {

namespace {

RowState state_of(const TensorView& t) {
  if (!given(t)) return {};
  return {t.data, t.stride[0], t.dtype == Dtype::f32};
}

RowUpdateParams params_of(const char* op, const RowUpdateArgs& a) {
  RowUpdateParams p{};
  p.param = a.param.data;
  p.param_stride = a.param.stride[0];
  p.first = state_of(a.first);
  p.second = state_of(a.second);
  p.rows = integers(a.rows);
  p.count = integers(a.count);
  p.grads = static_cast<const float*>(a.grads.data);
  p.grad_stride = a.grads.stride[0];
  p.num_rows = a.param.shape[0];
  p.capacity = a.rows.shape[0];
  constexpr int kStep = 128;  // that a warp takes
  p.dim = as_int(op, "columns", a.param.shape[1] + kStep) - kStep;
  p.lr = static_cast<float>(a.lr);
  p.decay = static_cast<float>(a.weight_decay);
  p.eps = static_cast<float>(a.eps);
  if (a.optimiser != Optimiser::adam) return p;
  const double step = static_cast<double>(a.step);
  p.lr = static_cast<float>(a.lr / (1 - std::pow(a.beta1, step)));
  p.keep = static_cast<float>(1 - a.lr * a.weight_decay);
  p.keep_mean = static_cast<float>(a.beta1);
  p.take_mean = static_cast<float>(1 - a.beta1);
  p.keep_square = static_cast<float>(a.beta2);
  p.take_square = static_cast<float>(1 - a.beta2);
  p.correct_square = static_cast<float>(1 / (1 - std::pow(a.beta2, step)));
  return p;
}

// Whether rows can be moved by that many elements.
bool rows_aligned(const TensorView& t, int elements) {
  return t.ndim < 2 || is_aligned(t, 1, elements * item_size(t.dtype));
}

template <class T, class Rule>
void run(const char* op, const RowUpdateArgs& a, const Context& ctx) {
  const RowUpdateParams p = params_of(op, a);
  constexpr int kElements = 4;
  const bool aligned = p.dim % kElements == 0 && rows_aligned(a.param, kElements) &&
                       rows_aligned(a.first, kElements) && rows_aligned(a.second, kElements) &&
                       rows_aligned(a.grads, kElements);
  const int64_t most = int64_t{limits_of(op, ctx.device).multiprocessors} * 16;
  launch(op, ctx, aligned ? update_rows<T, Rule, kElements> : update_rows<T, Rule, 1>,
         std::min(most, ceil_div(p.capacity, kUpdateWarps)), kUpdateThreads, 0, p);
}

}  // namespace

void row_update(const char* op, const RowUpdateArgs& a, const Context& ctx) {
  check_supported(op, "param", a.param);
  const DeviceGuard guard(op, ctx.device);
  with_type(a.param.dtype, [&](auto type) {
    using T = decltype(type);
    switch (a.optimiser) {
      case Optimiser::adam:
        return run<T, AdamRule>(op, a, ctx);
      case Optimiser::adagrad:
        return a.first.ndim == 2 ? run<T, AdagradRule>(op, a, ctx)
                                 : run<T, RowAdagradRule>(op, a, ctx);
      default:
        return run<T, SgdRule>(op, a, ctx);
    }
  });
}

}  // namespace memkernels::lookup::cuda
