#include "core/ceiling.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "core/check.h"

namespace memkernels {

namespace {

// Calls piece(i, first, last) for pieces i of [0, n) of up to `most`, on all workers.
template <class Piece>
void for_each_piece(const Context& ctx, int64_t n, int64_t most, const Piece& piece) {
  run_tasks(ctx, ctx.num_workers, (n + most - 1) / most,
            [&](int64_t i, int) { piece(i, i * most, std::min(n, (i + 1) * most)); });
}

constexpr int64_t kPieceBytes = int64_t{1} << 20;

}  // namespace

double read_ceiling(const TensorView& t, const Context& ctx) {
  check_contiguous("_read_ceiling", "tensor", t);
  const CeilingKernel kernel = MEMKERNELS_CPU(cpu_isa(), ceiling_kernel)();
  const char* data = static_cast<const char*>(t.data);
  const int64_t bytes = numel(t) * item_size(t.dtype);
  std::vector<double> sums(bytes / kPieceBytes + 1);
  for_each_piece(ctx, bytes, kPieceBytes, [&](int64_t i, int64_t first, int64_t last) {
    sums[i] = kernel.read(data + first, last - first);
  });
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

double gather_ceiling(const TensorView& t, const TensorView& order, const Context& ctx) {
  check_contiguous("_gather_ceiling", "tensor", t);
  check_contiguous("_gather_ceiling", "order", order);
  check_dtype("_gather_ceiling", "order", order, Dtype::i64);
  const CeilingKernel kernel = MEMKERNELS_CPU(cpu_isa(), ceiling_kernel)();
  const char* data = static_cast<const char*>(t.data);
  const int64_t row_bytes = t.stride[0] * item_size(t.dtype), num_rows = order.shape[0];
  const int64_t* rows = static_cast<const int64_t*>(order.data);
  for (int64_t i = 0; i < num_rows; ++i) {
    check(rows[i] >= 0 && rows[i] < t.shape[0], "_gather_ceiling", "order[", i, "] = ", rows[i],
          " is outside [0, ", t.shape[0], ")");
  }
  const int64_t most = std::max<int64_t>(1, kPieceBytes / std::max<int64_t>(1, row_bytes));
  std::vector<double> sums(num_rows / most + 1);
  for_each_piece(ctx, num_rows, most, [&](int64_t i, int64_t first, int64_t last) {
    sums[i] = kernel.gather(data, row_bytes, rows + first, last - first);
  });
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

void update_ceiling(const TensorView& t, const Context& ctx) {
  check_contiguous("_update_ceiling", "tensor", t);
  const CeilingKernel kernel = MEMKERNELS_CPU(cpu_isa(), ceiling_kernel)();
  char* data = static_cast<char*>(t.data);
  for_each_piece(
      ctx, numel(t) * item_size(t.dtype), kPieceBytes,
      [&](int64_t, int64_t first, int64_t last) { kernel.update(data + first, last - first); });
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
