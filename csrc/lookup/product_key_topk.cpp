#include "lookup/product_key_topk.h"

#include <algorithm>

#include "attention/plan.h"
#include "core/check.h"
#include "core/memory.h"

namespace memkernels::lookup {

namespace {

constexpr char kOp[] = "product_key_topk";

void check_arguments(const ProductKeyArgs& a) {
  check_floating(kOp, "query", a.query);
  check_shape(kOp, "query", a.query, "[T, H, 2, Dk]", {-1, -1, 2, -1});
  check(a.query.shape[3] > 0, kOp, "query has Dk = 0");
  check_rows_contiguous(kOp, "query", a.query);
  check_shape(kOp, "keys", a.keys, "[H, 2, N, Dk]", {a.query.shape[1], 2, -1, a.query.shape[3]});
  check_dtype(kOp, "keys", a.keys, a.query.dtype);
  check_device(kOp, "keys", a.keys, a.query.device);
  check_rows_contiguous(kOp, "keys", a.keys);
  const int64_t size = a.keys.shape[2], k = a.scores.shape[2];
  check(size <= 65536, kOp, "keys must be at most 65536 a half, got ", size);
  const int64_t most = std::min<int64_t>(128, size);
  check(k >= 1 && k <= most, kOp, "k must be 1 to ", most, ", got ", k);
}

}  // namespace

void product_key_topk(const ProductKeyArgs& a, const Context& ctx) {
  check_arguments(a);
#ifdef MEMKERNELS_WITH_CUDA
  if (ctx.device.type == DeviceType::cuda) return cuda::product_key_topk(a, ctx);
#endif
  const int64_t tokens = a.query.shape[0], heads = a.query.shape[1], size = a.keys.shape[2];
  if (tokens == 0 || heads == 0) return;
  const Isa isa = isa_for(a.query.dtype);
  const ProductKeyKernel kernel = MEMKERNELS_CPU(isa, product_key_kernel)(a.query.dtype);
  const double work = 2.0 * tokens * heads * size * a.query.shape[3];
  const int workers = attention::workers_for(ctx, work);

  const bool pack = tokens > kFewTokens;
  const size_t packed_bytes = pack ? align_up(kernel.packed_bytes(a)) : 0;
  const size_t scratch_bytes = align_up(kernel.scratch_bytes(a));
  const Workspace workspace =
      allocate_workspace(heads * 2 * packed_bytes + workers * scratch_bytes);
  char* const packed = static_cast<char*>(workspace.get());
  char* const scratch = packed + heads * 2 * packed_bytes;
  if (pack) {
    const int64_t blocks = (size + kHalfBlock - 1) / kHalfBlock;
    run_tasks(ctx, workers, heads * 2 * blocks, [&](int64_t i, int) {
      const int64_t half = i / blocks, begin = i % blocks * kHalfBlock;
      kernel.pack(a, half / 2, static_cast<int>(half % 2), begin,
                  std::min(size, begin + kHalfBlock), packed + half * packed_bytes);
    });
  }
  const int64_t blocks = (tokens + kProductKeyTokens - 1) / kProductKeyTokens;
  run_tasks(ctx, workers, heads * blocks, [&](int64_t i, int worker) {
    const int64_t head = i / blocks, first = i % blocks * kProductKeyTokens;
    kernel.run(a, head, first, std::min(kProductKeyTokens, tokens - first),
               pack ? packed + head * 2 * packed_bytes : nullptr, scratch + worker * scratch_bytes);
  });
}

}  // namespace memkernels::lookup
