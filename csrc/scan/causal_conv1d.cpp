#include "scan/causal_conv1d.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "core/check.h"
#include "core/memory.h"

namespace memkernels::scan {

namespace {

// What an op and its step have in common.
void check_weights(const char* op, const TensorView& x, const TensorView& weight,
                   const TensorView& bias, int64_t channels) {
  check_shape(op, "weight", weight, "[D, W]", {channels, -1});
  check_companion(op, "weight", weight, x.dtype);
  check_device(op, "weight", weight, x.device);
  check_rows_contiguous(op, "weight", weight);
  if (!given(bias)) return;
  check_shape(op, "bias", bias, "[D]", {channels});
  check_dtype(op, "bias", bias, weight.dtype);
  check_device(op, "bias", bias, x.device);
}

void check_state(const char* op, const char* arg, const TensorView& t, const CausalConvArgs& a,
                 int64_t sequences) {
  if (!given(t)) return;
  check_shape(op, arg, t, "[N, D, (W - 1) * dilation]",
              {sequences, a.x.shape[2], conv_state_length(op, a.weight, a.dilation)});
  check_dtype(op, arg, t, a.x.dtype);
  check_device(op, arg, t, a.x.device);
}

Sequences check_inputs(const char* op, const CausalConvArgs& a, const Context& ctx) {
  check_floating(op, "x", a.x);
  check_shape(op, "x", a.x, "[B, T, D]", {-1, -1, -1});
  check_rows_contiguous(op, "x", a.x);
  conv_state_length(op, a.weight, a.dilation);
  check_weights(op, a.x, a.weight, a.bias, a.x.shape[2]);
  const Sequences sequences =
      make_sequences(op, a.cu_seqlens, a.x.shape[0], a.x.shape[1], a.x.device);
  check_contents(op, sequences, ctx);
  check_state(op, "initial_state", a.initial_state, a, sequences.count);
  return sequences;
}

// `before`: also where there are no tokens, only inputs before them.
std::vector<ConvRun> runs_of(const Sequences& sequences, int64_t dilation, bool before) {
  std::vector<ConvRun> runs;
  for (int64_t n = 0; n < sequences.count; ++n) {
    const auto [batch, start, end] = sequences[n];
    const int64_t length = end - start;
    for (int64_t phase = 0; phase < (before ? dilation : std::min(dilation, length)); ++phase) {
      const int64_t count = phase < length ? (length - phase - 1) / dilation + 1 : 0;
      int64_t begin = 0;
      do {
        const int64_t stop = std::min(count, begin + kConvRun);
        runs.push_back({n, batch, start, length, phase, begin, stop});
        begin = stop;
      } while (begin < count);
    }
  }
  return runs;
}

CausalConvKernel kernel_for(const CausalConvArgs& a) {
  const Isa isa = isa_for(a.x.dtype);
  return MEMKERNELS_CPU(isa, causal_conv_kernel)(a.x.dtype, a.weight.dtype != a.x.dtype);
}

// Parts of all runs, cut by their number alone, and blocks of channels.
struct Plan {
  int64_t runs_per_part, parts, block, blocks;
  Plan(int64_t runs, int64_t channels, int64_t block) : block(std::min(block, channels)) {
    constexpr int64_t kMostParts = 64;
    runs_per_part = std::max<int64_t>(1, (runs + kMostParts - 1) / kMostParts);
    parts = (runs + runs_per_part - 1) / runs_per_part;
    blocks = (channels + block - 1) / block;
  }
};

}  // namespace

int64_t conv_state_length(const char* op, const TensorView& weight, int64_t dilation) {
  constexpr int64_t kMostTaps = 16;
  check_shape(op, "weight", weight, "[D, W]", {-1, -1});
  const int64_t taps = weight.shape[1];
  check(taps >= 1 && taps <= kMostTaps, op, "weight must have 1 to ", kMostTaps, " taps, got ",
        taps);
  check(dilation >= 1 && dilation <= INT32_MAX, op, "dilation must be from 1 to 2^31 - 1, got ",
        dilation);
  return (taps - 1) * dilation;
}

void causal_conv1d(const CausalConvArgs& a, const Context& ctx) {
  constexpr char op[] = "causal_conv1d";
  const Sequences sequences = check_inputs(op, a, ctx);
  const int64_t channels = a.x.shape[2];
  if (channels == 0) return;
#ifdef MEMKERNELS_WITH_CUDA
  if (ctx.device.type == DeviceType::cuda) return cuda::causal_conv1d(a, sequences, ctx);
#endif
  const CausalConvKernel kernel = kernel_for(a);
  const std::vector<ConvRun> runs = runs_of(sequences, a.dilation, false);
  constexpr int64_t kChannels = 512;
  const int64_t num_runs = static_cast<int64_t>(runs.size());
  const Plan plan(num_runs, channels, kChannels);
  const int workers = numel(a.x) > 65536 ? ctx.num_workers : 1;
  const size_t scratch_bytes = kernel.scratch_bytes(a, plan.block);
  const size_t packed_bytes =
      align_up((a.weight.shape[1] + 1) * channels * item_size(accumulator(a.x.dtype)));
  const Workspace workspace = allocate_workspace(packed_bytes + workers * scratch_bytes);
  char* const packed = static_cast<char*>(workspace.get());
  char* const scratch = packed + packed_bytes;
  kernel.pack(a, packed);
  run_tasks(ctx, workers, plan.parts * plan.blocks, [&](int64_t task, int worker) {
    const int64_t begin = task / plan.blocks * plan.runs_per_part;
    const int64_t first = task % plan.blocks * plan.block;
    kernel.forward(a, packed, runs.data() + begin, std::min(plan.runs_per_part, num_runs - begin),
                   first, std::min(channels, first + plan.block), scratch + worker * scratch_bytes);
  });
  if (!given(a.state)) return;
  run_tasks(ctx, workers, sequences.count, [&](int64_t n, int) {
    const auto [batch, start, end] = sequences[n];
    kernel.final_state(a, n, batch, start, end - start);
  });
}

void causal_conv1d_backward(const CausalConvArgs& a, const CausalConvGrads& g, const Context& ctx) {
  constexpr char op[] = "causal_conv1d_backward";
  const Sequences sequences = check_inputs(op, a, ctx);
  const int64_t channels = a.x.shape[2], taps = a.weight.shape[1];
  check_shape(op, "dout", g.dout, "[B, T, D]", {a.x.shape[0], a.x.shape[1], channels});
  check_dtype(op, "dout", g.dout, a.x.dtype);
  check_device(op, "dout", g.dout, a.x.device);
  check_rows_contiguous(op, "dout", g.dout);
  check_state(op, "dstate", g.dstate, a, sequences.count);
  if (channels == 0) return;
#ifdef MEMKERNELS_WITH_CUDA
  if (ctx.device.type == DeviceType::cuda) {
    return cuda::causal_conv1d_backward(a, g, sequences, ctx);
  }
#endif

  const CausalConvKernel kernel = kernel_for(a);
  const std::vector<ConvRun> runs =
      runs_of(sequences, a.dilation, given(g.dinitial_state) && numel(g.dinitial_state) > 0);
  constexpr int64_t kChannels = 256;
  const int64_t num_runs = static_cast<int64_t>(runs.size());
  const Plan plan(num_runs, channels, kChannels);
  const int workers = numel(a.x) > 32768 ? ctx.num_workers : 1;
  const bool sums = given(g.dweight) || given(g.dbias);
  const size_t scratch_bytes = kernel.scratch_bytes(a, plan.block);
  const size_t part_bytes = align_up((taps + 1) * channels * item_size(accumulator(a.x.dtype)));
  const Workspace workspace =
      allocate_workspace((1 + (sums ? plan.parts : 0)) * part_bytes + workers * scratch_bytes);
  char* const packed = static_cast<char*>(workspace.get());
  char* const scratch = packed + part_bytes;
  char* const parts = scratch + workers * scratch_bytes;
  kernel.pack(a, packed);
  run_tasks(ctx, workers, plan.parts * plan.blocks, [&](int64_t task, int worker) {
    const int64_t part = task / plan.blocks, begin = part * plan.runs_per_part;
    const int64_t first = task % plan.blocks * plan.block;
    kernel.backward(a, g, packed, runs.data() + begin,
                    std::min(plan.runs_per_part, num_runs - begin), first,
                    std::min(channels, first + plan.block),
                    sums ? parts + part * part_bytes : nullptr, scratch + worker * scratch_bytes);
  });
  if (!sums) return;
  run_tasks(ctx, workers, plan.blocks, [&](int64_t task, int) {
    const int64_t first = task * plan.block;
    kernel.add_parts(a, g, parts, part_bytes, plan.parts, first,
                     std::min(channels, first + plan.block));
  });
}

void causal_conv1d_step(const CausalConvStepArgs& a, const Context& ctx) {
  constexpr char op[] = "causal_conv1d_step";
  check_floating(op, "x", a.x);
  check_shape(op, "x", a.x, "[B, D]", {-1, -1});
  check_rows_contiguous(op, "x", a.x);
  const int64_t batch = a.x.shape[0], channels = a.x.shape[1];
  check_weights(op, a.x, a.weight, a.bias, channels);
  const int64_t size = conv_state_length(op, a.weight, a.dilation);
  check_shape(op, "state", a.state, "[slots, D, (W - 1) * dilation]", {-1, channels, size});
  check_dtype(op, "state", a.state, a.x.dtype);
  check_device(op, "state", a.state, a.x.device);
  const int64_t slots = a.state.shape[0];
  TensorView slot = a.state;
  slot.shape[0] = 1;
  check_contiguous(op, "state, in its last two dimensions,", slot);
  check(slots <= 1 || a.state.stride[0] >= channels * size, op, "state has slots that overlap");
  for (const auto& [arg, t] : {std::pair{"x", &a.x}, {"weight", &a.weight}, {"bias", &a.bias}}) {
    check_apart(op, "state", a.state, arg, *t);
  }
  check_state_indices(op, a.state_indices, batch, slots, ctx);
#ifdef MEMKERNELS_WITH_CUDA
  if (ctx.device.type == DeviceType::cuda) return cuda::causal_conv1d_step(a, ctx);
#endif
  std::vector<int64_t> places(batch);
  for (int64_t row = 0; row < batch; ++row) places[row] = slot_of(a.state_indices, row);

  const Isa isa = isa_for(a.x.dtype);
  const CausalConvStepKernel kernel =
      MEMKERNELS_CPU(isa, causal_conv_step_kernel)(a.x.dtype, a.weight.dtype != a.x.dtype);
  const int64_t per_task = std::max<int64_t>(1, 4096 / std::max<int64_t>(1, channels));
  const int64_t num_tasks = (batch + per_task - 1) / per_task;
  run_tasks(ctx, num_tasks > 2 ? ctx.num_workers : 1, num_tasks, [&](int64_t task, int) {
    kernel(a, places.data(), task * per_task, std::min(batch, (task + 1) * per_task));
  });
}

}  // namespace memkernels::scan
