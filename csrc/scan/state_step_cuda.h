// What the CUDA kernels of linear_attention_step and delta_rule_step read.
#pragma once

#include "core/cuda/launch.h"

namespace memkernels::scan::cuda {

using namespace memkernels::cuda;

inline constexpr int kStepThreads = 128;
inline constexpr int kStepColumns = 4, kStepRows = 8;  // of a state, that a thread holds
inline constexpr int kStepBlocks = 4;                  // of a multiprocessor

struct StateStepParams {
  const void *q, *k, *v, *beta, *g;  // [B, H, K], [B, H, K], [B, HV, V], [B, HV], [B, HV(, K)]
  int64_t q_strides[2], k_strides[2], v_strides[2], beta_strides[2], g_strides[2];
  bool wide_beta, wide_g;  // float32 beside narrower ones
  bool channels;           // g has a decay of each
  float *state, *z;        // [slots, HV, K, V], [slots, HV, K]
  int64_t state_strides[2], z_strides[2];
  Integers state_indices;
  int64_t slots;
  int all_heads, heads, group, keys, values;  // B HV, HV, HV / H, K, V
  bool keys_aligned;                          // rows of q, k and g, to kStepRows elements
  bool qk_l2norm;
  float scale, eps;
  float* factors;  // [B, HV], or null: scale
  void* out;       // [B, HV, V]

  // A tile is some columns of a state: `lanes` times kStepColumns of them, whose rows are shared by
  // `classes` of threads.
  int lanes, classes, pieces, tiles;  // pieces: tiles of a head
};

}  // namespace memkernels::scan::cuda
