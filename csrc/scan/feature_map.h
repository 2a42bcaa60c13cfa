// Feature maps of linear attention.
#pragma once

#include <stddef.h>

#include "core/context.h"
#include "core/isa.h"
#include "core/tensor.h"

namespace memkernels::scan {

enum class FeatureKind { elu1, relu2, taylor2, dpfp };

// Of rows of `dim` elements.
int64_t num_features(const char* op, FeatureKind kind, int64_t dim, int64_t nu);

struct FeatureMapArgs {
  TensorView x;  // [..., D]
  FeatureKind kind = FeatureKind::elu1;
  int64_t nu = 3;
  TensorView out;  // [..., features], contiguous
};

void feature_map(const FeatureMapArgs& args, const Context& ctx);

struct FeatureMapGrads {
  TensorView dout;  // [..., features]
  TensorView dx;    // [..., D], written, contiguous
};

void feature_map_backward(const FeatureMapArgs& args, const FeatureMapGrads& grads,
                          const Context& ctx);

namespace cuda {  // of checked ones
void feature_map(const FeatureMapArgs& args, const Context& ctx);
void feature_map_backward(const FeatureMapArgs& args, const FeatureMapGrads& grads,
                          const Context& ctx);
}  // namespace cuda

// Of rows [begin, end) of all.
struct FeatureMapKernel {
  size_t (*scratch_bytes)(int64_t dim, int64_t features);
  void (*forward)(const FeatureMapArgs&, int64_t features, int64_t begin, int64_t end,
                  void* scratch);
  void (*backward)(const FeatureMapArgs&, const FeatureMapGrads&, int64_t features, int64_t begin,
                   int64_t end, void* scratch);
};

MEMKERNELS_DECLARE_CPU(FeatureMapKernel, feature_map_kernel, (Dtype dtype))

}  // namespace memkernels::scan
