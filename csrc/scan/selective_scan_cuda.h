// What the CUDA kernels of selective_scan read, and how they share the work.
#pragma once

#include "scan/parts.cuh"
#include "scan/selective_scan.h"

namespace memkernels::scan::cuda {

inline constexpr int kScanPartTokens = 32;  // parts begin at every so many tokens of a sequence
inline constexpr int kLaneStates = 4;       // of a thread, side by side
inline constexpr int kSliceStates = 16;     // of a warp; fewer where there are no more
inline constexpr int kAgainTokens = 8;      // whose states a thread of the backward keeps
inline constexpr int kScanWarps = 4;        // of a block, unless its states need more
inline constexpr int kMostScanThreads = 512;
inline constexpr int kJoinThreads = 256;
inline constexpr int kSelectiveStepThreads = 256;

struct ScanRows {
  const void* data;
  int64_t strides[3];  // of the batch, tokens, groups
};
struct StateRows {
  const float* data;   // [N, D, S], or null: zeros
  int64_t strides[2];  // of sequences, channels
};
inline ScanRows scan_rows(const TensorView& t) {
  if (!given(t)) return {};
  return {t.data, {t.stride[0], t.stride[1], t.ndim == 4 ? t.stride[2] : 0}};
}
inline StateRows scan_state_rows(const TensorView& t) {
  if (!given(t)) return {};
  return {static_cast<const float*>(t.data), {t.stride[0], t.stride[1]}};
}

// In a warp 1 << lane_bits threads share a channel; a block has channel_warps times the channels of
// a warp, for each slice of 16 states. None of it changes bits of the forward.
struct ScanThreads {
  int lane_bits;     // 0 to 2
  int channel_bits;  // a block has 1 << channel_bits channels
  int slices, channel_warps;
  int group_blocks;  // of a group of channels

  __host__ __device__ int count() const { return 32 * slices * channel_warps; }
  __host__ __device__ int channels() const { return 1 << channel_bits; }
};

struct SelectiveScanParams {
  PartParams parts;            // of kScanPartTokens; "slots" are their numbers
  int64_t rows;                // B T
  ScanRows u, delta, z, dout;  // [B, T, D]; no data: absent
  ScanRows B, C;               // [B, T, G, S]
  const float *A, *D, *bias;   // [D, S], [D], [D]
  int64_t A_stride;
  StateRows initial, dstate;
  int dim, states, groups, group_size;
  bool softplus;
  ScanThreads threads;
  void* out;     // [B, T, D]
  float* state;  // [N, D, S], or null

  // Of parts; null where sequences are not cut.
  float* deltas;   // [slots, D], sums
  float* carries;  // [slots, D, S]: what a part's tokens leave; then what is before the part
  float* grads;    // [slots, D, S]: what they want of what is before; then what is wanted behind

  // Of the backward. What is not wanted is null.
  void *du, *ddelta, *dz;  // [B, T, D]
  float* dinitial;         // [N, D, S]
  float *dB, *dC;          // [runs, B, T, G, S]
  bool wants_dA, wants_dD, wants_dbias;
  int runs;  // of a group's blocks of channels, that a block goes through
  // Of parts: dA lies in carries, and of the bias in deltas.
  float* dD;  // [slots, D]
};

// Shapes, inputs and threads.
SelectiveScanParams scan_params(const char* op, const SelectiveScanArgs& args);

struct SelectiveStepParams {
  // [B, D], [B, G, S]; the strides are those of rows and, of B and C, groups.
  ScanRows u, delta, z, B, C;
  const float *A, *D, *bias;
  int64_t A_stride;
  int dim, states, group_size;
  bool softplus;
  float* state;  // [slots, D, S]
  int64_t state_stride, slots;
  Integers state_indices;
  int lanes;   // of a channel
  int blocks;  // of a row
  void* out;   // [B, D]
};

}  // namespace memkernels::scan::cuda
