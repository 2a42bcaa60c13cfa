#include "lookup/embedding_bag.h"

#include <algorithm>

#include "attention/plan.h"
#include "core/check.h"
#include "core/cuda/host_copy.h"
#include "core/memory.h"
#include "lookup/bags.h"
#include "lookup/page_in.h"

namespace memkernels::lookup {

namespace {

using attention::workers_for;

bool quantised(Dtype d) { return d == Dtype::i8 || d == Dtype::e4m3; }

// The device reads tables in the host's memory too, if that is pinned.
void check_table_device(const char* op, const char* arg, const TensorView& t, Device device) {
  if (device.type == DeviceType::cuda && t.device.type == DeviceType::cpu) return;
  check_device(op, arg, t, device);
}

void check_weight(const char* op, const TensorView& weight, Device device) {
  const bool known = is_floating(weight.dtype) || quantised(weight.dtype);
  check(known, op, "weight has an unsupported dtype ", name(weight.dtype),
        "; supported: float32, bfloat16, float16, float64 on the CPU, and with scales int8 and "
        "float8_e4m3fn");
  check_shape(op, "weight", weight, "[N, D]", {-1, -1});
  check(weight.shape[1] > 0, op, "weight has rows of D = 0");
  check_rows_contiguous(op, "weight", weight);
  check_table_device(op, "weight", weight, device);
}

void check_scales(const char* op, const TensorView& scales, const TensorView& weight,
                  Device device) {
  if (!quantised(weight.dtype)) {
    check(!given(scales), op, "scales must be None with ", name(weight.dtype), " weight");
    return;
  }
  check(given(scales), op, "scales are needed with ", name(weight.dtype), " weight");
  check(scales.dtype == Dtype::f32 || scales.dtype == Dtype::u8, op,
        "scales must be float32, or uint8 for e8m0, got ", name(scales.dtype));
  const bool fits = scales.ndim == 2 && scales.shape[0] == weight.shape[0] && scales.shape[1] > 0 &&
                    weight.shape[1] % scales.shape[1] == 0;
  check(fits, op, "scales must be [N, D / block] for weight ", shape_of(weight), ", got ",
        shape_of(scales));
  check_table_device(op, "scales", scales, device);
}

// The gradient of the result, for bags of these.
void check_grad(const char* op, const TensorView& grad, const Bags& bags) {
  check_floating(op, "grad", grad);
  check_shape(op, "grad", grad, "[T, D]", {num_bags(bags), -1});
  check(grad.shape[1] > 0, op, "grad has rows of D = 0");
  check_rows_contiguous(op, "grad", grad);
}

#ifdef MEMKERNELS_WITH_CUDA
void check_rows_on_host(const char* op, Bags bags, int64_t num_rows, const Context& ctx) {
  HostCopies copies(op, ctx);
  copies.replace(bags.input);
  copies.replace(bags.offsets);
  bags.factors = {};
  make_lists(op, "input", bags, num_rows, Dtype::f32);
}
#endif

void sum(const SumArgs& args, const Context& ctx) {
  const int64_t dim = args.table.shape[1],
                entries = args.lists.starts[args.lists.count] - args.lists.starts[0];
  const int workers = workers_for(ctx, static_cast<double>(entries + args.lists.count) * dim);
  const auto cuts = cut_lists(args.lists, dim, workers, given(args.scales));
  const SumKernel kernel =
      MEMKERNELS_CPU(isa_for(args.table.dtype), sum_rows_kernel)(args.table.dtype);
  const size_t scratch_bytes = align_up(kernel.scratch_bytes(dim));
  const Workspace workspace = allocate_workspace(workers * scratch_bytes);
  char* scratch = static_cast<char*>(workspace.get());
  run_tasks(ctx, workers, static_cast<int64_t>(cuts.size()), [&](int64_t i, int worker) {
    kernel.run(args, cuts[i], scratch + worker * scratch_bytes);
  });
}

}  // namespace

void embedding_bag(const EmbeddingBagArgs& a, const Context& ctx) {
  constexpr char op[] = "embedding_bag";
  check_weight(op, a.weight, ctx.device);
  check_scales(op, a.scales, a.weight, ctx.device);
  check_bags(op, "input", "per_sample_weights", a.bags, ctx.device, a.out.dtype);
#ifdef MEMKERNELS_WITH_CUDA
  if (ctx.device.type == DeviceType::cuda) {
    if (ctx.check_indices) check_rows_on_host(op, a.bags, a.weight.shape[0], ctx);
    return cuda::embedding_bag(a, ctx);
  }
#endif
  const OwnedLists lists =
      make_lists(op, "input", a.bags, a.weight.shape[0], accumulator(a.out.dtype));
  if (!missing_pages(a.weight, lists)) {
    sum({lists, a.weight, a.scales, a.out, nullptr, false}, ctx);
    return;
  }
  // So many bags at a time that what they read stays in memory until it has been read.
  constexpr int64_t kBytesAtOnce = int64_t{64} << 20, kPage = 4096;
  const int64_t row_bytes = a.weight.shape[1] * item_size(a.weight.dtype);
  const int64_t entries = std::max<int64_t>(1, kBytesAtOnce / (row_bytes + kPage));
  for (int64_t begin = 0, end; begin < lists.count; begin = end) {
    for (end = begin + 1; end < lists.count; ++end) {
      if (lists.starts[end + 1] - lists.starts[begin] > entries) break;
    }
    const Lists some{end - begin, lists.starts + begin, lists.rows, lists.factors};
    page_in(a.weight, some);
    TensorView out = a.out;
    out.data = static_cast<char*>(out.data) + begin * out.stride[0] * item_size(out.dtype);
    out.shape[0] = end - begin;
    sum({some, a.weight, a.scales, out, nullptr, false}, ctx);
  }
}

void embedding_bag_backward(const char* op, const EmbeddingBagGrads& a, int64_t num_embeddings,
                            const Context& ctx) {
  check_bags(op, "input", "per_sample_weights", a.bags, a.grad.device, a.grad.dtype);
  check_grad(op, a.grad, a.bags);
  const int64_t dim = a.grad.shape[1];
  if (a.accumulate) {
    check_shape(op, "out", a.dense, "[num_embeddings, D]", {num_embeddings, dim});
    check_companion(op, "out", a.dense, a.grad.dtype);
    check_device(op, "out", a.dense, a.grad.device);
    check_rows_contiguous(op, "out", a.dense);
    check(num_embeddings < 2 || a.dense.stride[0] >= dim, op, "out has rows that overlap");
    check_apart(op, "out", a.dense, "grad", a.grad);
    check_apart(op, "out", a.dense, "input", a.bags.input);
    check_apart(op, "out", a.dense, "per_sample_weights", a.bags.factors);
  }
#ifdef MEMKERNELS_WITH_CUDA
  if (ctx.device.type == DeviceType::cuda) {
    if (ctx.check_indices) check_rows_on_host(op, a.bags, num_embeddings, ctx);
    return cuda::embedding_bag_backward(op, a, num_embeddings, ctx);
  }
#endif
  const Dtype sums = accumulator(a.grad.dtype);
  const OwnedLists lists = make_lists(op, "input", a.bags, num_embeddings, sums);
  const Readers readers = invert(op, lists, num_embeddings, sums);
  const int64_t found = static_cast<int64_t>(readers.rows.size());
  const bool listed = given(a.rows);
  const TensorView& out = listed ? a.grads : a.dense;
  if (listed) {
    int64_t* rows = static_cast<int64_t*>(a.rows.data);
    std::copy(readers.rows.begin(), readers.rows.end(), rows);
    std::fill(rows + found, rows + a.rows.shape[0], -1);
    *static_cast<int64_t*>(a.count.data) = found;
  }
  // What fills most pages of a fresh buffer is better off with large ones.
  const int64_t row_bytes = dim * item_size(out.dtype);
  if (!a.accumulate && 8 * found >= out.shape[0]) {
    advise_huge_pages(out.data, (listed ? found : out.shape[0]) * row_bytes);
  }
  sum({readers.lists, a.grad, {}, out, listed ? nullptr : readers.rows.data(), a.accumulate}, ctx);
}

void embedding_bag_weights(const EmbeddingBagWeightsArgs& a, const Context& ctx) {
  constexpr char op[] = "embedding_bag_weights";
  check_weight(op, a.weight, ctx.device);
  check_scales(op, a.scales, a.weight, ctx.device);
  const Dtype dtype = given(a.scales) ? Dtype::f32 : a.weight.dtype;
  check_bags(op, "input", "per_sample_weights", a.bags, ctx.device, dtype);
  check_grad(op, a.grad, a.bags);
  check_dtype(op, "grad", a.grad, dtype);
  const int64_t dim = a.weight.shape[1];
  check_shape(op, "grad", a.grad, "[T, D]", {-1, dim});
  check_device(op, "grad", a.grad, ctx.device);
#ifdef MEMKERNELS_WITH_CUDA
  if (ctx.device.type == DeviceType::cuda) {
    if (ctx.check_indices) check_rows_on_host(op, a.bags, a.weight.shape[0], ctx);
    return cuda::embedding_bag_weights(a, ctx);
  }
#endif
  const OwnedLists lists = make_lists(op, "input", a.bags, a.weight.shape[0], accumulator(dtype));
  const int workers = workers_for(ctx, static_cast<double>(numel(a.bags.input)) * dim);
  const auto cuts = cut_lists(lists, dim, workers, true);
  const ProductKernel kernel = MEMKERNELS_CPU(isa_for(dtype), multiply_rows_kernel)(a.weight.dtype);
  const size_t scratch_bytes = align_up(kernel.scratch_bytes(dim));
  const Workspace workspace = allocate_workspace(workers * scratch_bytes);
  char* scratch = static_cast<char*>(workspace.get());
  const ProductArgs args{lists, a.grad, a.weight, a.scales, a.out.data};
  run_tasks(ctx, workers, static_cast<int64_t>(cuts.size()), [&](int64_t i, int worker) {
    kernel.run(args, cuts[i], scratch + worker * scratch_bytes);
  });
}

}  // namespace memkernels::lookup
