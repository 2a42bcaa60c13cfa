// A causal convolution of each channel along its sequence, and its step on a pool of states.
#pragma once

#include <stddef.h>

#include "core/context.h"
#include "core/isa.h"
#include "core/tensor.h"
#include "scan/sequences.h"

namespace memkernels::scan {

enum class ConvActivation { none, silu };

struct CausalConvArgs {
  TensorView x;              // [B, T, D]
  TensorView weight;         // [D, W]
  TensorView bias;           // [D]; or absent
  TensorView initial_state;  // [N, D, (W - 1) * dilation]; or absent
  TensorView cu_seqlens;     // [N + 1]; or absent: N = B
  int64_t dilation = 1;
  ConvActivation activation = ConvActivation::none;
  // Written, contiguous.
  TensorView out;    // [B, T, D]
  TensorView state;  // [N, D, (W - 1) * dilation]; or absent
};

// (W - 1) * dilation; refuses what cannot be those of a convolution.
int64_t conv_state_length(const char* op, const TensorView& weight, int64_t dilation);

void causal_conv1d(const CausalConvArgs& args, const Context& ctx);

struct CausalConvGrads {
  TensorView dout;    // [B, T, D]
  TensorView dstate;  // [N, D, (W - 1) * dilation]; or absent
  // Written, contiguous; or absent.
  TensorView dx;              // [B, T, D]
  TensorView dweight, dbias;  // [D, W], [D], in accumulators
  TensorView dinitial_state;  // [N, D, (W - 1) * dilation]
};

void causal_conv1d_backward(const CausalConvArgs& args, const CausalConvGrads& grads,
                            const Context& ctx);

struct CausalConvStepArgs {
  TensorView x;              // [B, D]
  TensorView weight;         // [D, W]
  TensorView bias;           // [D]; or absent
  TensorView state;          // [slots, D, (W - 1) * dilation], changed
  TensorView state_indices;  // [B]; or absent
  int64_t dilation = 1;
  ConvActivation activation = ConvActivation::none;
  TensorView out;  // [B, D], contiguous
};

void causal_conv1d_step(const CausalConvStepArgs& args, const Context& ctx);

namespace cuda {  // of checked ones
void causal_conv1d(const CausalConvArgs& args, const Sequences& sequences, const Context& ctx);
void causal_conv1d_backward(const CausalConvArgs& args, const CausalConvGrads& grads,
                            const Sequences& sequences, const Context& ctx);
void causal_conv1d_step(const CausalConvStepArgs& args, const Context& ctx);
}  // namespace cuda

// Tokens that lie a dilation apart are a sequence of their own, of a dilation of 1. A run of them:
struct ConvRun {
  int64_t sequence, batch;
  int64_t start, length;  // of the whole sequence, in T
  int64_t phase;          // the first token's place in the sequence, below the dilation
  int64_t begin, end;     // the run's tokens, counted in dilations from the first one
};

// The most tokens of a run: what a backward keeps of one.
inline constexpr int64_t kConvRun = 64;

// Channels [first, last) are worked on together. `packed` is [W + 1, D] in accumulators: the
// weights, transposed, and the bias.
struct CausalConvKernel {
  void (*pack)(const CausalConvArgs&, void* packed);
  // Of one worker, for so many channels.
  size_t (*scratch_bytes)(const CausalConvArgs&, int64_t channels);
  void (*forward)(const CausalConvArgs&, const void* packed, const ConvRun* runs, int64_t num_runs,
                  int64_t first, int64_t last, void* scratch);
  // Leaves the runs' part of dweight and dbias, [W + 1, D] as packed.
  void (*backward)(const CausalConvArgs&, const CausalConvGrads&, const void* packed,
                   const ConvRun* runs, int64_t num_runs, int64_t first, int64_t last, void* part,
                   void* scratch);
  // dweight and dbias: the sum of the parts.
  void (*add_parts)(const CausalConvArgs&, const CausalConvGrads&, const void* parts,
                    size_t part_bytes, int64_t num_parts, int64_t first, int64_t last);
  // The final state of a sequence: tokens [start, start + length) of a row of the batch.
  void (*final_state)(const CausalConvArgs&, int64_t sequence, int64_t batch, int64_t start,
                      int64_t length);
};

// weight: whether it is wider than `dtype`.
MEMKERNELS_DECLARE_CPU(CausalConvKernel, causal_conv_kernel, (Dtype dtype, bool wide_weight))

// Rows [begin, end) of a step; slots: of all rows, or -1.
using CausalConvStepKernel = void (*)(const CausalConvStepArgs&, const int64_t* slots,
                                      int64_t begin, int64_t end);
MEMKERNELS_DECLARE_CPU(CausalConvStepKernel, causal_conv_step_kernel,
                       (Dtype dtype, bool wide_weight))

}  // namespace memkernels::scan
