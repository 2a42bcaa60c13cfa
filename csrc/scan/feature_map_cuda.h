// What the CUDA kernels of feature_map read.
#pragma once

#include "core/cuda/launch.h"

namespace memkernels::scan::cuda {

using namespace memkernels::cuda;

inline constexpr int kMapThreads = 256;
inline constexpr int kMapRows = 4;        // of Taylor features, that lie side by side
inline constexpr int kMapFeatures = 512;  // of Taylor features, that a block has of its rows

// Rows of a tensor [..., D], neighbouring dimensions as one where their strides allow it.
struct MapRows {
  const void* data;
  int num_dims;
  int64_t shape[kMaxDims], stride[kMaxDims];
};

struct FeatureMapParams {
  MapRows x, dout;  // [rows, dim], [rows, features]
  int64_t rows, dim, features;
  int64_t nu;
  bool relu;   // of elements: relu2, or elu1
  void* to;    // [rows, features], or of a backward [rows, dim]
  int groups;  // of kMapRows rows, that a block has
  bool staged;
  float first, second, diagonal;  // factors of x_i, of x_i x_j, and of x_i x_i on top of that
};

}  // namespace memkernels::scan::cuda
