// Mamba's selective scan: each channel has a state of S numbers, moved on by every token.
#pragma once

#include <cstddef>

#include "core/context.h"
#include "core/isa.h"
#include "core/tensor.h"
#include "scan/sequences.h"

namespace memkernels::scan {

struct SelectiveScanArgs {
  TensorView u, delta;       // [B, T, D]
  TensorView A;              // [D, S]
  TensorView B, C;           // [B, T, G, S]
  TensorView D;              // [D], or absent
  TensorView z;              // [B, T, D], or absent
  TensorView delta_bias;     // [D], or absent
  TensorView initial_state;  // [N, D, S], or absent
  Sequences sequences;
  bool delta_softplus = false;
  TensorView out;    // [B, T, D], contiguous
  TensorView state;  // [N, D, S], contiguous, or absent
};

void selective_scan(const SelectiveScanArgs& args, const Context& ctx);

struct SelectiveScanGrads {
  TensorView dout;    // [B, T, D]
  TensorView dstate;  // [N, D, S], or absent
  // Written, contiguous; or absent.
  TensorView du, ddelta, dz;   // [B, T, D]
  TensorView dA;               // [D, S]
  TensorView dB, dC;           // [B, T, G, S]
  TensorView dD, ddelta_bias;  // [D]
  TensorView dinitial_state;   // [N, D, S]
};

void selective_scan_backward(const SelectiveScanArgs& args, const SelectiveScanGrads& grads,
                             const Context& ctx);

struct SelectiveScanStepArgs {
  TensorView u, delta;       // [B, D]
  TensorView A;              // [D, S]
  TensorView B, C;           // [B, G, S]
  TensorView state;          // [slots, D, S], changed
  TensorView D;              // [D], or absent
  TensorView z;              // [B, D], or absent
  TensorView delta_bias;     // [D], or absent
  TensorView state_indices;  // [B], or absent
  bool delta_softplus = false;
  TensorView out;  // [B, D], contiguous
};

void selective_scan_step(const SelectiveScanStepArgs& args, const Context& ctx);

namespace cuda {
void selective_scan(const SelectiveScanArgs& args, const Context& ctx);
void selective_scan_backward(const SelectiveScanArgs& args, const SelectiveScanGrads& grads,
                             const Context& ctx);
void selective_scan_step(const SelectiveScanStepArgs& args, const Context& ctx);
}  // namespace cuda

inline constexpr int64_t kMostStates = 256;

// Channels [first, first + count) of a group: what a task has in its caches.
inline constexpr int64_t kChannels = 64;
struct Channels {
  int64_t first, count, group;
};

// What a task of the backward leaves to be added up, in accumulators; null: not wanted.
struct SelectiveScanParts {
  void* dA;                // [D, S]
  void *dD, *ddelta_bias;  // [D]
  void *dB, *dC;           // [B, T, G, S]
  bool add;                // to dB and dC of other channels
};

// All of sequences [begin, end) and a block of channels.
struct SelectiveScanKernel {
  size_t (*scratch_bytes)(int64_t states);
  void (*forward)(const SelectiveScanArgs&, const Channels&, int64_t begin, int64_t end,
                  void* scratch);
};
struct SelectiveScanBackwardKernel {
  size_t (*scratch_bytes)(int64_t states, int64_t longest);  // longest: of the sequences
  void (*backward)(const SelectiveScanArgs&, const SelectiveScanGrads&, const SelectiveScanParts&,
                   const Channels&, int64_t begin, int64_t end, void* scratch);
  // Elements [begin, end) of a gradient: the sum of parts.
  void (*add_parts)(const TensorView& to, const void* parts, int64_t num_parts, int64_t begin,
                    int64_t end);
};
// slot: that of the row, or -1.
using SelectiveScanStepKernel = void (*)(const SelectiveScanStepArgs&, const Channels&, int64_t row,
                                         int64_t slot);

MEMKERNELS_DECLARE_CPU(SelectiveScanKernel, selective_scan_kernel, (Dtype dtype))
MEMKERNELS_DECLARE_CPU(SelectiveScanBackwardKernel, selective_scan_backward_kernel, (Dtype dtype))
MEMKERNELS_DECLARE_CPU(SelectiveScanStepKernel, selective_scan_step_kernel, (Dtype dtype))

}  // namespace memkernels::scan
