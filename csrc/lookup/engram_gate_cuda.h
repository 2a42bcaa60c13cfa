// What the CUDA kernels of engram_gate read.
#pragma once

#include "core/cuda/launch.h"

namespace memkernels::lookup::cuda {

using namespace memkernels::cuda;

inline constexpr int kGateWarps = 8;
inline constexpr int kGateThreads = 32 * kGateWarps;
inline constexpr int kGateChannels = 1024;  // the most of a backward
inline constexpr int kGateParts = 384;  // the most of dweight: three blocks for 128 multiprocessors

struct GateParams {
  const void *hidden, *k, *v, *weight;  // [T, C, D], [T, C, D], [T, D], [C, D]
  int64_t hidden_strides[2], k_strides[2], v_stride, weight_stride;
  bool wide_weight;  // float32 beside narrower ones
  bool copy_sign;
  int64_t tokens;
  int channels, dim;
  int row_warps;  // that share a row
  float eps, scale;
  void* out;  // [T, C, D]

  // Of a backward. What is written may be null.
  const void* dout;  // [T, C, D]
  int64_t dout_strides[2];
  void *dhidden, *dk, *dv;  // [T, C, D], [T, C, D], [T, D]
  float* parts;             // [blocks, C, D]
  bool parts_in_shared;     // while they grow
  int64_t block_tokens;
};

struct GatePartsParams {
  const float* parts;  // [num_parts, numbers]
  int num_parts;
  int64_t numbers;
  void* sums;  // [numbers]
};

}  // namespace memkernels::lookup::cuda
