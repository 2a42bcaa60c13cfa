// What the CUDA kernels of row_sgd, row_adagrad and row_adam read.
#pragma once

#include "core/cuda/launch.h"

namespace memkernels::lookup::cuda {

using namespace memkernels::cuda;

inline constexpr int kUpdateWarps = 4, kUpdateThreads = 32 * kUpdateWarps;

// A state of elements [N, D], or one of each row [N].
struct RowState {
  void* data;
  int64_t stride;
  bool is_float;  // or else of the dtype of the table
};

struct RowUpdateParams {
  void* param;  // [N, D]
  int64_t param_stride;
  RowState first, second;
  Integers rows, count;  // [M], of which no two are the same row; [1]
  const float* grads;    // [M, D]
  int64_t grad_stride;
  int64_t num_rows, capacity;  // N, M
  int dim;
  float lr, decay, eps;  // lr of Adam: corrected
  // Of Adam.
  float keep, keep_mean, take_mean, keep_square, take_square, correct_square;
};

}  // namespace memkernels::lookup::cuda
