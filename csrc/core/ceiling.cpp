#include "core/ceiling.h"

#include <vector>

#include "core/check.h"

namespace memkernels {

double read_ceiling(const TensorView& t, const Context& ctx) {
  check_contiguous("read_ceiling", "tensor", t);
  const CeilingKernel kernel = MEMKERNELS_CPU(cpu_isa(), ceiling_kernel)();
  constexpr int64_t kPiece = int64_t{1} << 20;
  const int64_t bytes = numel(t) * item_size(t.dtype);
  const int64_t pieces = (bytes + kPiece - 1) / kPiece;
  std::vector<double> sums(pieces);
  run_tasks(ctx, ctx.num_workers, pieces, [&](int64_t i, int) {
    const int64_t begin = i * kPiece;
    const int64_t size = begin + kPiece < bytes ? kPiece : bytes - begin;
    sums[i] = kernel.read(static_cast<const char*>(t.data) + begin, size);
  });
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

double flop_ceiling(Dtype dtype, int64_t rounds, const Context& ctx) {
  const CeilingKernel kernel = MEMKERNELS_CPU(cpu_isa(), ceiling_kernel)();
  std::vector<double> flops(ctx.num_workers), sinks(ctx.num_workers);
  run_tasks(ctx, ctx.num_workers, ctx.num_workers,
            [&](int64_t i, int) { flops[i] = kernel.flops(dtype, rounds, &sinks[i]); });
  double total = 0;
  for (double f : flops) total += f;
  return total;
}

}  // namespace memkernels
