// What the CUDA kernel of sparse_ffn and its backward reads.
#pragma once

#include "core/cuda/launch.h"
#include "lookup/rows.cuh"
#include "lookup/sparse_ffn.h"

namespace memkernels::lookup::cuda {

inline constexpr int kMostFfnThreads = 256;

struct FfnParams {
  Table x, dy;     // [T, D], [T, Dout]; dy.data is null in the forward
  Table up, down;  // [N, D], [N, Dout]
  Integers indices;
  int64_t index_row_stride;
  int num_rows, listed;  // N, K
  const void* weights;   // [T, K] or null
  bool weights_are_float;
  int64_t weight_row_stride, weight_stride;
  Activation activation;
  int product_lanes;  // that share a row

  // [T, K]; in the forward but down_factors null.
  float *dweights, *up_factors, *down_factors;
  // out = sum of sum_factors * rows of `summed`
  Table summed;
  const float* sum_factors;
  void* out;

  // Blocks of a token, and what each has: neurons, and slabs of the columns of the sum.
  int blocks, neurons, slabs;
};

}  // namespace memkernels::lookup::cuda
