// What the CUDA kernels of lsh_codes read.
#pragma once

#include "core/cuda/launch.h"

namespace memkernels::lookup::cuda {

using namespace memkernels::cuda;

inline constexpr int kCodeThreads = 256;

struct LshCodesParams {
  const void* z;  // [T, tables, bits]
  int64_t z_strides[2];
  int64_t rows, tables;  // rows: T tables
  int bits;
  int32_t* codes;  // [T, tables]
  float* scores;   // [T, tables]

  // Of a backward.
  const float* dscores;  // [T, tables]
  int64_t dscores_strides[2];
  void* dz;  // [T, tables, bits]
};

}  // namespace memkernels::lookup::cuda
