// What the CUDA kernels of causal_conv1d read.
#pragma once

#include "scan/parts.cuh"

namespace memkernels::scan::cuda {

inline constexpr int kConvWarps = 8;
inline constexpr int kConvThreads = 32 * kConvWarps;
inline constexpr int kConvBackwardWarps = 4;
inline constexpr int kConvBackwardThreads = 32 * kConvBackwardWarps;
inline constexpr int kConvPhases = 16;  // the most that are runs of their own

struct ConvParams {
  // A tile, a part of a sequence, has a run for each phase, or a single one for all of them.
  PartParams tiles;
  int64_t tile_runs, num_runs;
  const void *x, *weight, *bias, *initial_state;  // [B, T, D], [D, W], [D], [N, D, L]
  int64_t x_strides[2], weight_stride, bias_stride, initial_strides[3];
  bool wide_weight, silu;      // float32 beside narrower ones
  int channels, taps, groups;  // groups: of the channels of a warp
  int64_t dilation, state_length;
  int64_t x_step, dout_step, out_step;  // from a token to the next of its run
  void *out, *state;                    // [B, T, D], [N, D, L]

  // Of a backward. What is written may be null.
  const void *dout, *dstate;  // [B, T, D], [N, D, L]
  int64_t dout_strides[2], dstate_strides[3];
  void *dx, *dinitial_state;  // [B, T, D], [N, D, L]
  float* parts;               // [num_parts, W + 1, D]
  int64_t warp_runs;
};

struct ConvPartsParams {
  const float* parts;
  int64_t num_parts;
  int channels, taps;
  float *dweight, *dbias;  // [D, W], [D]; or null
};

struct ConvStepParams {
  const void *x, *weight, *bias;  // [B, D], [D, W], [D]
  int64_t x_stride, weight_stride, bias_stride;
  bool wide_weight, silu;
  void* state;  // [slots, D, L]
  int64_t state_stride, slots;
  Integers state_indices;  // [B], or absent
  int64_t rows, channels, dilation, state_length;
  int taps;
  void* out;  // [B, D]
};

}  // namespace memkernels::scan::cuda
