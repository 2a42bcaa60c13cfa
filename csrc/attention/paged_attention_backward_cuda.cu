// From the arguments of paged attention's backward to the kernels and their grids.
#include "attention/paged_attention_backward_cuda.h"

#include <algorithm>

#include "attention/entries_kernel.cuh"
#include "attention/paged_attention_backward_kernel.cuh"
#include "core/cuda/sort.h"

namespace memkernels::attention::cuda {

namespace {

// The kernels of one dtype and head dimension.
struct Kernels {
  void (*dq)(const char*, const BackwardParams&, int64_t, int64_t, const Context&);
  void (*dkv)(const char*, const BackwardParams&, int, int64_t, int64_t, const Context&);
};

template <class T>
Kernels kernels_for(int dim_class) {
  switch (dim_class) {
    case 64:
      return {launch_dq<T, 64>, launch_dkv<T, 64>};
    case 128:
      return {launch_dq<T, 128>, launch_dkv<T, 128>};
    case 256:
      return {launch_dq<T, 256>, launch_dkv<T, 256>};
    default:
      return {launch_dq<T, 576>, launch_dkv<T, 576>};
  }
}

template <class T>
void launch_rows(const char* op, const BackwardParams& p, const Context& ctx) {
  const int64_t rows = int64_t{p.a.total_q} * p.a.num_heads;
  launch(op, ctx, find_deltas<T>, ceil_div(rows, kRowsOfBlock), 32 * kRowsOfBlock, 0, p);
  if (p.dsink_logit) launch(op, ctx, find_dsink<T>, p.a.num_heads, 256, 256 * sizeof(float), p);
}

template <class T>
T* allocate(const Context& ctx, int64_t n) {
  return static_cast<T*>(ctx.allocate(ctx, n * static_cast<int64_t>(sizeof(T))));
}

void check_fits(const char* op, const BackwardParams& p, int64_t bytes, const Limits& limits) {
  check(bytes <= limits.of_block, op, "head dims ", p.a.dim, " and ", p.a.dim_v,
        " need more than the ", limits.of_block, " bytes of shared memory of a block on this GPU");
}

void run_dq(const char* op, const PagedAttentionArgs& args, BackwardParams p,
            const Kernels& kernels, int size, int dim_class, const Limits& limits,
            const Context& ctx) {
  AttentionParams& a = p.a;
  const int rows = rows_of_dq(size, dim_class), keys = keys_of_tile(size, dim_class);
  const int64_t pitches = pitch_of(int64_t{a.dim} * size) + pitch_of(int64_t{a.dim_v} * size);
  const int64_t tile = keys * (pitch_of(int64_t{a.dim} * size) +
                               (a.v_within_k ? 0 : pitch_of(int64_t{a.dim_v} * size)));
  a.stages = 2;
  const int64_t bytes = rows * pitches + a.stages * tile + (a.stages + 1) * (keys + 1) * 16;
  check_fits(op, p, bytes, limits);
  kernels.dq(op, p, plan_rows(a, args, rows) * a.num_kv_heads, bytes, ctx);
}

void run_dkv(const char* op, BackwardParams p, const Kernels& kernels, int size, int dim_class,
             const Limits& limits, const Context& ctx) {
  const AttentionParams& a = p.a;
  find_units(op, p, ctx);
  const int64_t pitches = pitch_of(int64_t{a.dim} * size) + pitch_of(int64_t{a.dim_v} * size);
  const auto bytes_of = [&](int keys) {
    const int rows = rows_of_dkv(size, dim_class, keys);
    return keys * pitches + 2 * rows * pitches + 3 * rows * int64_t{sizeof(SeeingRow)};
  };
  const bool small = p.runs && p.unit <= 16;
  const int keys =
      !small && has_64_keys(size, dim_class) && bytes_of(64) <= limits.of_block ? 64 : 16;
  check_fits(op, p, bytes_of(keys), limits);
  const int64_t tokens = p.runs ? p.unit : a.cu_seqlens_k.data ? keys : a.page_size;
  p.parts_of_unit = static_cast<int>(std::max<int64_t>(1, ceil_div(tokens, keys)));
  const int64_t units = p.runs                ? p.num_units
                        : a.cu_seqlens_k.data ? a.capacity / keys + a.num_sequences
                                              : a.num_sequences;
  const int64_t slices = ceil_div(std::max(a.dim, a.dim_v), kSlice);
  kernels.dkv(op, p, keys, units * p.parts_of_unit * a.num_kv_heads * slices, bytes_of(keys), ctx);
}

template <class T>
void run(const char* op, const PagedAttentionArgs& args, BackwardParams& p, const Context& ctx) {
  const int dim_class = class_of(std::max(p.a.dim, p.a.dim_v));
  const Kernels kernels = kernels_for<T>(dim_class);
  const Limits limits = limits_of(op, ctx.device);
  p.rows = allocate<RowGradient>(ctx, int64_t{p.a.total_q} * p.a.num_heads);
  launch_rows<T>(op, p, ctx);
  if (p.dq) run_dq(op, args, p, kernels, sizeof(T), dim_class, limits, ctx);
  if (p.dk || p.dv || p.dkey_bias) run_dkv(op, p, kernels, sizeof(T), dim_class, limits, ctx);
}

}  // namespace

void find_units(const char* op, BackwardParams& p, const Context& ctx) {
  const AttentionParams& a = p.a;
  p.runs = a.page_table.data || a.listed;
  p.lists = 1;
  if (!p.runs) return;
  const bool tokens = a.listed && a.unit == 1;
  p.unit = tokens ? 1 : a.page_size;
  const int64_t tokens_of_cache = int64_t{a.num_pages} * a.page_size;
  p.num_units = tokens ? tokens_of_cache : a.num_pages;
  if (a.listed && a.list_head_stride != 0) p.lists = a.num_kv_heads;
  const int64_t columns = a.page_size > 0 ? a.capacity / a.page_size : 0;
  const int64_t entries =
      a.listed ? int64_t{a.total_q} * p.lists * a.list_length : a.num_sequences * columns;
  const int64_t runs = p.lists * p.num_units;
  check(entries <= kNoLimit && runs <= kNoLimit, op, entries, " entries that name ", runs,
        " pages or tokens exceed what a CUDA launch takes");
  p.num_entries = static_cast<int>(entries);
  auto* const run_begin = allocate<int>(ctx, runs + 1);
  auto* keys = allocate<uint32_t>(ctx, entries + 1);
  auto* values = allocate<int>(ctx, entries + 1);
  int bits = 1;
  while (runs >> bits) ++bits;
  if (entries > 0) {
    launch(op, ctx, find_entries, ceil_div(entries, 256), 256, 0, p, keys, values);
    sort_by_key(op, keys, values, p.num_entries, bits, ctx);
  }
  launch(op, ctx, find_runs, ceil_div(runs + 1, 256), 256, 0, static_cast<const uint32_t*>(keys),
         p.num_entries, run_begin, runs);
  p.entries = values;
  p.run_begin = run_begin;
}

void paged_attention_backward(const char* op, const PagedAttentionArgs& args,
                              const PagedAttentionGrads& g, const Shapes& shapes,
                              const Context& ctx) {
  BackwardParams p{};
  p.a = params_of(op, args, shapes);
  if (shapes.total_q == 0 || shapes.heads == 0) return;
  const DeviceGuard guard(op, ctx.device);
  p.out = args.out.data;
  p.lse = static_cast<const float*>(args.lse.data);
  p.dout = g.dout.data;
  p.dout_stride = g.dout.stride[0];
  p.dout_head_stride = g.dout.stride[1];
  p.dout_aligned = aligned_to_16({p.dout, p.dout_stride, p.dout_head_stride, 0}, shapes.dim_v,
                                 item_size(args.q.dtype));
  p.dlse = static_cast<const float*>(g.dlse.data);
  p.dq = g.dq.data;
  p.dk = g.dk_cache.data;
  p.dv = g.dv_cache.data;
  p.dkey_bias = g.dkey_bias.data;
  p.dsink_logit = g.dsink_logit.data;
  switch (args.q.dtype) {
    case Dtype::f32:
      return run<float>(op, args, p, ctx);
    case Dtype::bf16:
      return run<bf16>(op, args, p, ctx);
    default:
      return run<f16>(op, args, p, ctx);
  }
}

}  // namespace memkernels::attention::cuda
