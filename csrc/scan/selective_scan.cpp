#include "scan/selective_scan.h"

#include <algorithm>
#include <utility>

#include "core/check.h"
#include "core/memory.h"

namespace memkernels::scan {

namespace {

// What a scan of tokens and a step, of one token, have in common.
template <class Args>
void check_inputs(const char* op, const Args& a, bool tokens) {
  const Device device = a.u.device;
  const Dtype main = a.u.dtype, wide = accumulator(main);
  const char* const row = tokens ? "[B, T, D]" : "[B, D]";
  const char* const group_row = tokens ? "[B, T, G, S]" : "[B, G, S]";
  check_floating(op, "u", a.u);
  tokens ? check_shape(op, "u", a.u, row, {-1, -1, -1}) : check_shape(op, "u", a.u, row, {-1, -1});
  const int64_t *shape = a.u.shape, dim = shape[a.u.ndim - 1];
  check(dim > 0, op, "u has dimension D of 0");
  check_shape(op, "A", a.A, "[D, S]", {dim, -1});
  const int64_t states = a.A.shape[1];
  check(states >= 1 && states <= kMostStates, op, "A must have 1 to ", kMostStates, " states, got ",
        states);
  const auto check_rows = [&](const char* arg, const TensorView& t) {
    if (!given(t)) return;
    tokens ? check_shape(op, arg, t, row, {shape[0], shape[1], dim})
           : check_shape(op, arg, t, row, {shape[0], dim});
    check_dtype(op, arg, t, main);
  };
  check_rows("delta", a.delta);
  check_rows("z", a.z);
  for (const auto& [arg, t] : {std::pair{"B", &a.B}, {"C", &a.C}}) {
    tokens ? check_shape(op, arg, *t, group_row, {shape[0], shape[1], -1, states})
           : check_shape(op, arg, *t, group_row, {shape[0], -1, states});
    check_dtype(op, arg, *t, main);
  }
  const int64_t groups = a.B.shape[a.B.ndim - 2];
  check(groups > 0 && dim % groups == 0, op, "B has ", groups, " groups, which must divide ", dim,
        " channels");
  check(a.C.shape[a.C.ndim - 2] == groups, op, "C must have ", groups, " groups, got ",
        a.C.shape[a.C.ndim - 2]);
  for (const auto& [arg, t] : {std::pair{"D", &a.D}, {"delta_bias", &a.delta_bias}}) {
    if (given(*t)) check_shape(op, arg, *t, "[D]", {dim});
    if (given(*t)) check_dtype(op, arg, *t, wide);
  }
  check_dtype(op, "A", a.A, wide);
  for (const auto& [arg, t] : {std::pair{"u", &a.u},
                               {"delta", &a.delta},
                               {"A", &a.A},
                               {"B", &a.B},
                               {"C", &a.C},
                               {"D", &a.D},
                               {"z", &a.z},
                               {"delta_bias", &a.delta_bias}}) {
    if (!given(*t)) continue;
    check_device(op, arg, *t, device);
    check_rows_contiguous(op, arg, *t);
  }
}

void check_state(const char* op, const char* arg, const TensorView& t, const SelectiveScanArgs& a) {
  if (!given(t)) return;
  check_shape(op, arg, t, "[N, D, S]", {a.sequences.count, a.A.shape[0], a.A.shape[1]});
  check_dtype(op, arg, t, a.A.dtype);
  check_device(op, arg, t, a.u.device);
  check_rows_contiguous(op, arg, t);
}

void check_scan(const char* op, const SelectiveScanArgs& a, const Context& ctx) {
  check_inputs(op, a, true);
  check_state(op, "initial_state", a.initial_state, a);
  check_contents(op, a.sequences, ctx);
}

// The channels of each group, cut into blocks.
struct Blocks {
  int64_t group_size, per_group, count;

  explicit Blocks(int64_t dim, int64_t groups)
      : group_size(dim / groups),
        per_group((group_size + kChannels - 1) / kChannels),
        count(groups * per_group) {}

  Channels operator[](int64_t i) const {
    const int64_t group = i / per_group, offset = i % per_group * kChannels;
    return {group * group_size + offset, std::min(kChannels, group_size - offset), group};
  }
};

int workers_for(int64_t exponentials, const Context& ctx) {
  return exponentials > 32768 ? ctx.num_workers : 1;
}

}  // namespace

void selective_scan(const SelectiveScanArgs& a, const Context& ctx) {
  check_scan("selective_scan", a, ctx);
#ifdef MEMKERNELS_WITH_CUDA
  if (ctx.device.type == DeviceType::cuda) return cuda::selective_scan(a, ctx);
#endif
  const int64_t tokens = a.u.shape[0] * a.u.shape[1], sequences = a.sequences.count;
  // Short sequences share a task, which lays out its part of A only once.
  constexpr int64_t kLeastTokens = 64;
  const int64_t per_task =
      std::max<int64_t>(1, kLeastTokens * sequences / std::max<int64_t>(1, tokens));
  const int64_t ranges = (sequences + per_task - 1) / per_task;
  const Blocks blocks(a.u.shape[2], a.B.shape[2]);
  const int workers = workers_for(tokens * numel(a.A), ctx);
  const SelectiveScanKernel kernel =
      MEMKERNELS_CPU(isa_for(a.u.dtype), selective_scan_kernel)(a.u.dtype);
  const size_t bytes = align_up(kernel.scratch_bytes(a.A.shape[1]));
  const Workspace workspace = allocate_workspace(workers * bytes);
  char* const scratch = static_cast<char*>(workspace.get());
  run_tasks(ctx, workers, ranges * blocks.count, [&](int64_t i, int worker) {
    const int64_t begin = i / blocks.count * per_task;
    kernel.forward(a, blocks[i % blocks.count], begin, std::min(sequences, begin + per_task),
                   scratch + worker * bytes);
  });
}

void selective_scan_backward(const SelectiveScanArgs& a, const SelectiveScanGrads& g,
                             const Context& ctx) {
  constexpr char op[] = "selective_scan_backward";
  check_scan(op, a, ctx);
  check_shape(op, "dout", g.dout, "[B, T, D]", {a.u.shape[0], a.u.shape[1], a.u.shape[2]});
  check_dtype(op, "dout", g.dout, a.u.dtype);
  check_device(op, "dout", g.dout, a.u.device);
  check_rows_contiguous(op, "dout", g.dout);
  check_state(op, "dstate", g.dstate, a);
#ifdef MEMKERNELS_WITH_CUDA
  if (ctx.device.type == DeviceType::cuda) return cuda::selective_scan_backward(a, g, ctx);
#endif

  const int64_t dim = a.A.shape[0], states = a.A.shape[1], sequences = a.sequences.count;
  const int64_t tokens = a.u.shape[0] * a.u.shape[1], groups = a.B.shape[2];
  int64_t longest = 0;
  for (int64_t n = 0; n < sequences; ++n) {
    const Span span = a.sequences[n];
    longest = std::max(longest, span.end - span.begin);
  }
  // A task takes a run of a group's blocks and a range of sequences. Of each run there is a part
  // of dB and dC, and of each range one of the weights' gradients; how many depends on the shapes
  // alone.
  constexpr int64_t kMostRuns = 16, kTasks = 64;
  const Blocks blocks(dim, groups);
  const int64_t runs = std::min(kMostRuns, blocks.per_group);
  const int64_t ranges =
      std::clamp<int64_t>((kTasks - 1) / (runs * groups) + 1, 1, std::max<int64_t>(1, sequences));

  const SelectiveScanBackwardKernel kernel =
      MEMKERNELS_CPU(isa_for(a.u.dtype), selective_scan_backward_kernel)(a.u.dtype);
  const int workers = workers_for(tokens * numel(a.A), ctx);
  const size_t scratch_bytes = align_up(kernel.scratch_bytes(states, longest));
  struct Gradient {
    const TensorView& to;
    void* SelectiveScanParts::* part;
    bool of_runs;
    size_t bytes = 0, offset = 0;  // of a part; of the first
  } gradients[] = {{g.dA, &SelectiveScanParts::dA, false},
                   {g.dD, &SelectiveScanParts::dD, false},
                   {g.ddelta_bias, &SelectiveScanParts::ddelta_bias, false},
                   {g.dB, &SelectiveScanParts::dB, true},
                   {g.dC, &SelectiveScanParts::dC, true}};
  size_t bytes = workers * scratch_bytes;
  for (Gradient& gradient : gradients) {
    if (!given(gradient.to)) continue;
    gradient.bytes = numel(gradient.to) * item_size(a.A.dtype);
    gradient.offset = bytes;
    bytes += align_up((gradient.of_runs ? runs : ranges) * gradient.bytes);
  }
  const Workspace workspace = allocate_workspace(bytes);
  char* const memory = static_cast<char*>(workspace.get());

  run_tasks(ctx, workers, ranges * groups * runs, [&](int64_t i, int worker) {
    const int64_t run = i % runs, group = i / runs % groups, range = i / runs / groups;
    const int64_t first = run * blocks.per_group / runs;
    const int64_t last = (run + 1) * blocks.per_group / runs;
    SelectiveScanParts parts{};
    for (const Gradient& gradient : gradients) {
      if (!given(gradient.to)) continue;
      const int64_t part = gradient.of_runs ? run : range;
      parts.*gradient.part = memory + gradient.offset + part * gradient.bytes;
    }
    for (int64_t block = first; block < last; ++block) {
      parts.add = block > first;
      kernel.backward(a, g, parts, blocks[group * blocks.per_group + block],
                      range * sequences / ranges, (range + 1) * sequences / ranges,
                      memory + worker * scratch_bytes);
    }
  });
  for (const Gradient& gradient : gradients) {
    if (!given(gradient.to)) continue;
    constexpr int64_t kPerTask = 4096;
    const int64_t size = numel(gradient.to);
    run_tasks(ctx, workers, (size + kPerTask - 1) / kPerTask, [&](int64_t i, int) {
      kernel.add_parts(gradient.to, memory + gradient.offset, gradient.of_runs ? runs : ranges,
                       i * kPerTask, std::min(size, (i + 1) * kPerTask));
    });
  }
}

void selective_scan_step(const SelectiveScanStepArgs& a, const Context& ctx) {
  constexpr char op[] = "selective_scan_step";
  check_inputs(op, a, false);
  const int64_t rows = a.u.shape[0], dim = a.A.shape[0], states = a.A.shape[1];
  check_shape(op, "state", a.state, "[slots, D, S]", {-1, dim, states});
  check_dtype(op, "state", a.state, a.A.dtype);
  check_device(op, "state", a.state, a.u.device);
  TensorView slot = a.state;
  slot.shape[0] = 1;
  check_contiguous(op, "each slot of state", slot);
  const int64_t slots = a.state.shape[0];
  check(slots <= 1 || a.state.stride[0] >= dim * states, op, "state has slots that overlap");
  const std::pair<const char*, const TensorView*> inputs[] = {
      {"u", &a.u}, {"delta", &a.delta}, {"A", &a.A}, {"B", &a.B},
      {"C", &a.C}, {"D", &a.D},         {"z", &a.z}, {"delta_bias", &a.delta_bias}};
  for (const auto& [arg, t] : inputs) check_apart(op, "state", a.state, arg, *t);
  check_state_indices(op, a.state_indices, rows, slots, ctx);
#ifdef MEMKERNELS_WITH_CUDA
  if (ctx.device.type == DeviceType::cuda) return cuda::selective_scan_step(a, ctx);
#endif

  const Blocks blocks(dim, a.B.shape[1]);
  constexpr int64_t kPerTask = 8;
  const int64_t count = rows * blocks.count;
  const auto kernel = MEMKERNELS_CPU(isa_for(a.u.dtype), selective_scan_step_kernel)(a.u.dtype);
  run_tasks(ctx, workers_for(rows * numel(a.A), ctx), (count + kPerTask - 1) / kPerTask,
            [&](int64_t task, int) {
              const int64_t end = std::min(count, (task + 1) * kPerTask);
              for (int64_t i = task * kPerTask; i < end; ++i) {
                const int64_t row = i / blocks.count;
                kernel(a, blocks[i % blocks.count], row, slot_of(a.state_indices, row));
              }
            });
}

}  // namespace memkernels::scan
