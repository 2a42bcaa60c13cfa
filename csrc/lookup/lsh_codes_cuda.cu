#include "lookup/lsh_codes_kernel.cuh"

#include "lookup/lsh_codes.h"

namespace memkernels::lookup::cuda {

namespace {

void run(const char* op, const LshCodesArgs& a, LshCodesParams p, const Context& ctx) {
  check_supported(op, "z", a.z);
  p.z = a.z.data;
  p.z_strides[0] = a.z.stride[0];
  p.z_strides[1] = a.z.stride[1];
  p.tables = a.z.shape[1];
  p.rows = a.z.shape[0] * p.tables;
  p.bits = static_cast<int>(a.z.shape[2]);
  const DeviceGuard guard(op, ctx.device);
  with_type(a.z.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kCount = 16 / sizeof(T);
    const auto addresses = reinterpret_cast<uintptr_t>(p.z) | reinterpret_cast<uintptr_t>(p.dz);
    const int64_t numbers = p.z_strides[0] | p.z_strides[1] | p.bits;
    const bool aligned = addresses % 16 == 0 && numbers % kCount == 0;
    const auto forward = aligned ? lsh_codes<T, kCount> : lsh_codes<T, 1>;
    const auto backward = aligned ? lsh_codes_backward<T, kCount> : lsh_codes_backward<T, 1>;
    launch(op, ctx, p.dz ? backward : forward, ceil_div(p.rows, kCodeThreads), kCodeThreads, 0, p);
  });
}

}  // namespace

void lsh_codes(const LshCodesArgs& a, const Context& ctx) {
  LshCodesParams p{};
  p.codes = static_cast<int32_t*>(a.codes.data);
  p.scores = static_cast<float*>(a.scores.data);
  run("lsh_codes", a, p, ctx);
}

void lsh_codes_backward(const LshCodesArgs& a, const LshCodesGrads& g, const Context& ctx) {
  LshCodesParams p{};
  p.dscores = static_cast<const float*>(g.dscores.data);
  p.dscores_strides[0] = g.dscores.stride[0];
  p.dscores_strides[1] = g.dscores.stride[1];
  p.dz = g.dz.data;
  run("lsh_codes_backward", a, p, ctx);
}

}  // namespace memkernels::lookup::cuda
