#include <algorithm>

#include "core/cuda/sort.h"
#include "lookup/embedding_bag.h"
#include "lookup/embedding_bag_backward_kernel.cuh"

namespace memkernels::lookup::cuda {

namespace {

template <class T>
T* allocate(const Context& ctx, int64_t n) {
  return static_cast<T*>(ctx.allocate(ctx, n * static_cast<int64_t>(sizeof(T))));
}

// All but what is found out on the device.
BagGradParams params_of(const char* op, const EmbeddingBagGrads& a, int64_t num_rows) {
  BagGradParams p{};
  p.grad = a.grad.data;
  p.grad_stride = a.grad.stride[0];
  const TensorView &input = a.bags.input, &factors = a.bags.factors, &out = a.dense;
  const int last = input.ndim - 1;
  p.input = integers(input, last);
  p.n = as_int(op, "indices", numel(input));
  p.width = last == 0 ? p.n : as_int(op, "indices of a bag", input.shape[1]);
  p.input_row_stride = last == 0 ? 0 : input.stride[0];
  p.factors = factors.data;
  p.factors_are_float = factors.dtype == Dtype::f32;
  p.factor_stride = given(factors) ? factors.stride[last] : 0;
  p.factor_row_stride = given(factors) && last > 0 ? factors.stride[0] : 0;
  p.offsets = integers(a.bags.offsets);
  p.num_bags = as_int(op, "bags", a.grad.shape[0]);
  p.num_rows = num_rows;
  check(num_rows <= 0xffffffff, op, "num_embeddings = ", num_rows, " exceeds the 2^32 - 1 rows ",
        "that CUDA kernels can sort by");
  p.dim = as_int(op, "columns", a.grad.shape[1] + kTileColumns) - kTileColumns;
  p.tiles = static_cast<int>(ceil_div(p.dim, kTileColumns));
  const TensorView& to = given(a.rows) ? a.grads : out;
  p.out = to.data;
  p.out_stride = to.stride[0];
  p.out_is_float = to.dtype == Dtype::f32;
  p.accumulate = a.accumulate;
  if (given(a.rows)) {
    p.rows = static_cast<int64_t*>(a.rows.data);
    p.count = static_cast<int64_t*>(a.count.data);
  }
  return p;
}

void sort_entries(const char* op, BagGradParams& p, const Context& ctx) {
  p.keys = allocate<uint32_t>(ctx, p.n);
  p.entries = allocate<int>(ctx, p.n);
  if (p.offsets.data) p.bags = allocate<int>(ctx, p.n);
  launch(op, ctx, key_entries, ceil_div(p.n, 256), 256, 0, p);
  int bits = 1;
  while (p.num_rows >> bits) ++bits;
  sort_by_key(op, p.keys, p.entries, p.n, bits, ctx);
}

template <class T, int V>
void add_entries(const char* op, const BagGradParams& p, const Context& ctx) {
  Stage stages[kMostStages + 1] = {};
  const int64_t counter_bytes = kMostStages * sizeof(int);
  int* const counters = static_cast<int*>(ctx.allocate(ctx, counter_bytes));
  clear(op, ctx, counters, counter_bytes);
  int num_stages = 0;
  for (int64_t span = kPiece; span < p.n; span *= kFan, ++num_stages) {
    Stage& stage = stages[num_stages];
    stage.sums = allocate<float>(ctx, 2 * ceil_div(p.n, span) * p.dim);
    stage.nodes = allocate<Node>(ctx, p.n / span + 1);
    stage.num_nodes = counters + num_stages;
  }
  constexpr int64_t kShared = (4 * kGradWarps * kPiece + kGradWarps) * sizeof(int);
  launch(op, ctx, add_pieces<T, V>, ceil_div(p.n, kPositions) * p.tiles, kGradThreads, kShared, p,
         stages[0]);
  if (num_stages == 0) return;
  const int64_t blocks = int64_t{limits_of(op, ctx.device).multiprocessors} * 16;
  int64_t span = kPiece;
  for (int i = 0; i < num_stages; ++i, span *= kFan) {
    const int64_t most = ceil_div((p.n / span + 1) * p.tiles, kGradWarps);
    launch(op, ctx, add_sums<T, V>, std::min(blocks, most), kGradThreads, 0, p, stages[i], span,
           stages[i + 1]);
  }
}

// Whether rows can be moved by 16 bytes of grad's elements, and as many of the result's.
bool is_aligned(const BagGradParams& p, int64_t size) {
  const int64_t out_size = p.out_is_float ? 4 : size;
  const int64_t all = reinterpret_cast<intptr_t>(p.grad) | p.grad_stride * size | p.dim * size |
                      reinterpret_cast<intptr_t>(p.out) | p.out_stride * out_size;
  return all % 16 == 0;
}

}  // namespace

void embedding_bag_backward(const char* op, const EmbeddingBagGrads& a, int64_t num_embeddings,
                            const Context& ctx) {
  check_supported(op, "grad", a.grad);
  BagGradParams p = params_of(op, a, num_embeddings);
  const DeviceGuard guard(op, ctx.device);
  if (p.n == 0) {
    if (p.count) clear(op, ctx, p.count, sizeof(int64_t));
    return;
  }
  sort_entries(op, p, ctx);
  if (p.rows) {
    const int64_t blocks = ceil_div(p.n, kPositions);
    p.ranks = allocate<int>(ctx, blocks);
    launch(op, ctx, count_heads, blocks, kPositions, kPositions / 32 * sizeof(int), p);
    launch(op, ctx, scan_counts, 1, kScanThreads, kScanThreads / 32 * sizeof(int), p.ranks, blocks,
           p.count);
  }
  with_type(a.grad.dtype, [&](auto type) {
    using T = decltype(type);
    if (is_aligned(p, sizeof(T))) {
      add_entries<T, 16 / sizeof(T)>(op, p, ctx);
    } else {
      add_entries<T, 1>(op, p, ctx);
    }
  });
}

}  // namespace memkernels::lookup::cuda
