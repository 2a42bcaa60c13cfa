#include "lookup/sparse_ffn.h"

#include <algorithm>

#include "lookup/sparse_ffn_kernel.cuh"

namespace memkernels::lookup::cuda {

namespace {

// Blocks count some way beyond these.
int size_of(const char* op, const char* what, int64_t n) {
  check(n <= 1 << 28, op, what, " ", n, " exceed what the CUDA kernel takes");
  return static_cast<int>(n);
}

Table table_of(const char* op, const char* what, const TensorView& t) {
  return {t.data, t.stride[0], size_of(op, what, t.shape[1])};
}

bool aligned(const Table& table, int64_t size) {
  return reinterpret_cast<uintptr_t>(table.data) % 16 == 0 &&
         (table.stride | table.columns) * size % 16 == 0;
}

// All but the factors and the sum.
FfnParams params_of(const char* op, const SparseFfnArgs& a) {
  check_supported(op, "x", a.x);
  FfnParams p{};
  p.x = table_of(op, "columns of x", a.x);
  p.up = table_of(op, "columns of up", a.up);
  p.down = table_of(op, "columns of down", a.down);
  p.indices = integers(a.indices, 1);
  p.index_row_stride = a.indices.stride[0];
  p.num_rows = as_int(op, "rows of up", a.up.shape[0]);
  p.listed = size_of(op, "neurons of a token", a.indices.shape[1]);
  p.weights = a.weights.data;
  p.weights_are_float = a.weights.dtype == Dtype::f32;
  if (given(a.weights)) {
    p.weight_row_stride = a.weights.stride[0];
    p.weight_stride = a.weights.stride[1];
  }
  p.activation = a.activation;
  return p;
}

template <class T, int kElements>
void launch_ffn(const char* op, FfnParams p, int64_t tokens, const Context& ctx) {
  constexpr int kSlab = kSlabLanes * kElements;
  const auto threads_of = [](int64_t groups, int lanes) {
    int threads = 64;
    while (threads < kMostFfnThreads && threads < groups * lanes) threads *= 2;
    return threads;
  };
  const int runs = static_cast<int>(ceil_div(p.listed, run_length(p.listed)));
  const int slabs = p.out ? static_cast<int>(ceil_div(p.summed.columns, kSlab)) : 0;
  const int64_t run_bytes = runs * kSlab * sizeof(float);
  p.product_lanes = product_lanes(p.x.columns, kElements);

  // Blocks of 256 threads fill a multiprocessor two at a time; what a token reads must be worth a
  // second launch.
  const int64_t bytes = p.listed * (int64_t{p.up.columns} + p.down.columns) * sizeof(T);
  const bool few = tokens < 2 * limits_of(op, ctx.device).multiprocessors && bytes > 64 * 1024;
  const auto run = [&](int64_t blocks, int neurons, int slabs_of_block, int threads) {
    p.blocks = static_cast<int>(blocks);
    p.neurons = neurons;
    p.slabs = slabs_of_block;
    launch(op, ctx, sparse_ffn<T, kElements>, tokens * blocks, threads,
           slabs_of_block == 1 ? run_bytes : 0, p);
  };
  if (!few) {
    run(1, p.listed, slabs,
        slabs == 1 ? threads_of(runs, kSlabLanes) : threads_of(slabs, kSlabLanes));
    return;
  }
  constexpr int kThreads = 128;
  const int neurons = kThreads / p.product_lanes * kProductRows;
  run(ceil_div(p.listed, neurons), neurons, 0, kThreads);
  if (slabs > 0) run(slabs, 0, 1, threads_of(runs, kSlabLanes));
}

void launch_ffn(const char* op, const FfnParams& p, const TensorView& x, const Context& ctx) {
  const int64_t size = item_size(x.dtype);
  bool whole_chunks = true;
  for (const Table& table : {p.x, p.up, p.down, p.dy, Table{p.out, 0, 0}}) {
    whole_chunks = whole_chunks && aligned(table, size);
  }
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    const auto run = whole_chunks ? launch_ffn<T, 16 / sizeof(T)> : launch_ffn<T, 1>;
    run(op, p, x.shape[0], ctx);
  });
}

}  // namespace

void sparse_ffn(const SparseFfnArgs& a, const Context& ctx) {
  constexpr char op[] = "sparse_ffn";
  FfnParams p = params_of(op, a);
  if (a.x.shape[0] == 0) return;
  const DeviceGuard guard(op, ctx.device);
  p.down_factors = static_cast<float*>(ctx.allocate(ctx, numel(a.indices) * sizeof(float)));
  p.summed = p.down;
  p.sum_factors = p.down_factors;
  p.out = a.out.data;
  launch_ffn(op, p, a.x, ctx);
}

void sparse_ffn_backward(const SparseFfnArgs& a, const SparseFfnGrads& g, const Context& ctx) {
  constexpr char op[] = "sparse_ffn_backward";
  FfnParams p = params_of(op, a);
  if (a.x.shape[0] == 0) return;
  const DeviceGuard guard(op, ctx.device);
  p.dy = table_of(op, "columns of dy", g.dy);
  p.dweights = static_cast<float*>(g.dweights.data);
  p.up_factors = static_cast<float*>(g.up_factors.data);
  p.down_factors = static_cast<float*>(g.down_factors.data);
  p.summed = p.up;
  p.sum_factors = p.up_factors;
  p.out = g.dx.data;
  launch_ffn(op, p, a.x, ctx);
}

}  // namespace memkernels::lookup::cuda
