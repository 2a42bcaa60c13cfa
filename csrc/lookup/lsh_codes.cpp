#include "lookup/lsh_codes.h"

#include <algorithm>

#include "core/check.h"

namespace memkernels::lookup {

namespace {

void check_z(const char* op, const TensorView& z) {
  check_floating(op, "z", z);
  check_shape(op, "z", z, "[T, tables, bits]", {-1, -1, -1});
  check(z.shape[2] >= 1 && z.shape[2] <= kMostBits, op, "z must be of 1 to ", kMostBits,
        " bits, got ", z.shape[2]);
  check_rows_contiguous(op, "z", z);
}

template <class Rows>
void for_rows(const TensorView& z, const Context& ctx, const Rows& run) {
  const int64_t rows = z.shape[0] * z.shape[1];
  const int64_t per_task = 8192 / z.shape[2];
  const int64_t num_tasks = (rows + per_task - 1) / per_task;
  run_tasks(ctx, num_tasks > 2 ? ctx.num_workers : 1, num_tasks, [&](int64_t task, int) {
    run(task * per_task, std::min(rows, (task + 1) * per_task));
  });
}

LshCodesKernel kernel_for(const TensorView& z) {
  const Isa isa = isa_for(z.dtype);
  return MEMKERNELS_CPU(isa, lsh_codes_kernel)(z.dtype);
}

}  // namespace

void lsh_codes(const LshCodesArgs& a, const Context& ctx) {
  constexpr char op[] = "lsh_codes";
  check_z(op, a.z);
  check_shape(op, "codes", a.codes, "[T, tables]", {a.z.shape[0], a.z.shape[1]});
  check_dtype(op, "codes", a.codes, Dtype::i32);
  check_contiguous(op, "codes", a.codes);
  check_shape(op, "scores", a.scores, "[T, tables]", {a.z.shape[0], a.z.shape[1]});
  check_dtype(op, "scores", a.scores, accumulator(a.z.dtype));
  check_contiguous(op, "scores", a.scores);
#ifdef MEMKERNELS_WITH_CUDA
  if (ctx.device.type == DeviceType::cuda) return cuda::lsh_codes(a, ctx);
#endif
  const LshCodesKernel kernel = kernel_for(a.z);
  for_rows(a.z, ctx, [&](int64_t begin, int64_t end) { kernel.forward(a, begin, end); });
}

void lsh_codes_backward(const LshCodesArgs& a, const LshCodesGrads& g, const Context& ctx) {
  constexpr char op[] = "lsh_codes_backward";
  check_z(op, a.z);
  const int64_t* shape = a.z.shape;
  check_shape(op, "dscores", g.dscores, "[T, tables]", {shape[0], shape[1]});
  check_dtype(op, "dscores", g.dscores, accumulator(a.z.dtype));
  check_device(op, "dscores", g.dscores, a.z.device);
  check_shape(op, "dz", g.dz, "[T, tables, bits]", {shape[0], shape[1], shape[2]});
  check_dtype(op, "dz", g.dz, a.z.dtype);
  check_contiguous(op, "dz", g.dz);
#ifdef MEMKERNELS_WITH_CUDA
  if (ctx.device.type == DeviceType::cuda) return cuda::lsh_codes_backward(a, g, ctx);
#endif
  const LshCodesKernel kernel = kernel_for(a.z);
  for_rows(a.z, ctx, [&](int64_t begin, int64_t end) { kernel.backward(a, g, begin, end); });
}

}  // namespace memkernels::lookup
