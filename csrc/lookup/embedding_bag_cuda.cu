// From the arguments of embedding_bag and embedding_bag_weights to kernels and their grids.
#include <algorithm>

#include "lookup/embedding_bag.h"
#include "lookup/embedding_bag_kernel.cuh"

namespace memkernels::lookup::cuda {

namespace {

// Calls run with a value of a dtype of rows.
template <class Run>
void with_row_type(Dtype dtype, const Run& run) {
  switch (dtype) {
    case Dtype::i8:
      return run(int8_t());
    case Dtype::e4m3:
      return run(e4m3());
    default:
      return with_type(dtype, run);
  }
}

const void* data_of(const char* op, const char* arg, const TensorView& t) {
  const bool pinned = t.device.type == DeviceType::cpu && numel(t) > 0;
  return pinned ? pinned_data(op, arg, t) : t.data;
}

// Everything but how rows are cut, grad and out.
BagParams params_of(const char* op, const Bags& bags, const TensorView& weight,
                    const TensorView& scales) {
  if (!given(scales)) check_supported(op, "weight", weight);
  BagParams p{};
  const int last = bags.input.ndim - 1;
  p.input = integers(bags.input, last);
  p.input_row_stride = bags.input.stride[0];
  p.offsets = integers(bags.offsets);
  p.num_bags = given(bags.offsets) ? bags.offsets.shape[0] : bags.input.shape[0];
  p.bag_length = bags.input.shape[last];
  p.num_entries = numel(bags.input);
  if (given(bags.factors)) {
    p.factors = bags.factors.data;
    p.factor_stride = bags.factors.stride[last];
    p.factor_row_stride = bags.factors.stride[0];
    p.wide_factors = bags.factors.dtype == Dtype::f32;
  }
  p.table = data_of(op, "weight", weight);
  p.table_on_host = weight.device.type == DeviceType::cpu;
  p.row_stride = weight.stride[0];
  p.num_rows = weight.shape[0];
  constexpr int64_t kMostColumns = 0x7fffffff - 4096;  // that lanes can step over
  check(weight.shape[1] <= kMostColumns, op, "rows of ", weight.shape[1],
        " elements exceed what a CUDA launch takes");
  p.dim = static_cast<int>(weight.shape[1]);
  if (given(scales)) {
    p.scales = data_of(op, "scales", scales);
    p.scale_row_stride = scales.stride[0];
    p.scale_stride = scales.stride[1];
    p.scale_block = static_cast<int>(weight.shape[1] / scales.shape[1]);
    p.e8m0 = scales.dtype == Dtype::u8;
  }
  return p;
}

bool aligned(const void* data, int64_t stride, int elements) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % elements == 0;
}

// As many lanes as waste few of them. By `elements` a lane; one at a time, more lanes share a
// sector, and of the host's memory a line.
void cut_rows(BagParams& p, int elements) {
  const int64_t chunks = ceil_div(p.dim, elements);
  p.block_lanes = elements > 1 && !p.table_on_host ? 4 : 8;
  p.lanes = 32;
  const auto slices = [&](int lanes) { return static_cast<int>(ceil_div(chunks, lanes)); };
  while (p.lanes > p.block_lanes && 8 * p.lanes * slices(p.lanes) > 9 * chunks) p.lanes /= 2;
  p.slices = slices(p.lanes);
  p.block_slices = slices(p.block_lanes);
}

// Calls run with the elements of a chunk, as a constant.
template <class R, class Run>
void with_chunk(BagParams& p, bool rows_aligned, const Run& run) {
  constexpr int kElements = 16 / sizeof(R);
  const bool whole = p.dim % kElements == 0 && (!kQuantised<R> || p.scale_block % kElements == 0);
  if (whole && rows_aligned && aligned(p.table, p.row_stride, kElements)) {
    cut_rows(p, kElements);
    run(std::integral_constant<int, kElements>());
  } else {
    cut_rows(p, 1);
    run(std::integral_constant<int, 1>());
  }
}

}  // namespace

void embedding_bag(const EmbeddingBagArgs& a, const Context& ctx) {
  constexpr char op[] = "embedding_bag";
  const DeviceGuard guard(op, ctx.device);
  BagParams p = params_of(op, a.bags, a.weight, a.scales);
  p.out = a.out.data;
  if (p.num_bags == 0) return;
  const bool flat = given(a.bags.offsets);
  const int64_t length = flat ? p.num_entries / p.num_bags : p.bag_length;  // as a rule
  with_row_type(a.weight.dtype, [&](auto type) {
    using R = decltype(type);
    with_chunk<R>(p, true, [&](auto elements) {
      constexpr int kElements = elements.value;
      const int64_t groups = kBagThreads / p.lanes;
      const int64_t blocks = ceil_div(p.num_bags, groups) * p.slices;
      const auto bytes_of = [&](int64_t threads, int64_t parts) {
        return Rows<R, kElements>::shared_bytes(static_cast<int>(threads)) +
               parts * p.block_lanes * kElements * int64_t{sizeof(float)};
      };
      // Where bags are too few for the GPU, their parts are more.
      const int64_t enough = limits_of(op, ctx.device).multiprocessors;
      p.by_block = length > kRowsAtOnce && p.num_bags * p.slices < enough * groups;
      if (!p.by_block) {
        const int64_t bytes = bytes_of(kBagThreads, flat ? kMaxParts : 0);
        return launch(op, ctx, sum_bags<R, kElements>, blocks, kBagThreads,
                      bytes + (flat ? groups * int64_t{sizeof(int)} : 0), p);
      }
      const int64_t parts = ceil_div(length, part_length(length));
      const int64_t threads =
          std::min<int64_t>(kBagThreads, ceil_div(parts * p.block_lanes, 32) * 32);
      launch(op, ctx, sum_bags<R, kElements>, p.num_bags * p.block_slices,
             static_cast<int>(threads), bytes_of(threads, flat ? kMaxParts : parts), p);
    });
  });
}

void embedding_bag_weights(const EmbeddingBagWeightsArgs& a, const Context& ctx) {
  constexpr char op[] = "embedding_bag_weights";
  const DeviceGuard guard(op, ctx.device);
  BagParams p = params_of(op, a.bags, a.weight, a.scales);
  p.grad = a.grad.data;
  p.grad_stride = a.grad.stride[0];
  p.out = a.out.data;
  with_row_type(a.weight.dtype, [&](auto type) {
    using R = decltype(type);
    const bool grad_aligned = aligned(p.grad, p.grad_stride, 16 / sizeof(Sum<R>));
    with_chunk<R>(p, grad_aligned, [&](auto elements) {
      constexpr int kElements = elements.value;
      const int64_t threads = ceil_div(p.num_entries, kRowsAtOnce) * p.lanes;
      launch(op, ctx, multiply_rows<R, kElements>, ceil_div(threads, kBagThreads), kBagThreads,
             Rows<R, kElements>::shared_bytes(kBagThreads), p);
    });
  });
}

}  // namespace memkernels::lookup::cuda
