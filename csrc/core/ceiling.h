// This machine's limits, measured with the means of the kernels: the same workers and vectors.
#pragma once

#include "core/context.h"
#include "core/isa.h"

namespace memkernels {

// Reads the whole contiguous tensor once; returns a sum that depends on all of it.
double read_ceiling(const TensorView& t, const Context& ctx);

// Runs independent multiply-adds in registers on every worker, `rounds` of them each; in the format
// kernels use for `dtype` (bfloat16 dot products where the CPU has them). Returns the flops done.
double flop_ceiling(Dtype dtype, int64_t rounds, const Context& ctx);

struct CeilingKernel {
  double (*read)(const char* data, int64_t bytes);
  double (*flops)(Dtype dtype, int64_t rounds, double* sink);
};

MEMKERNELS_DECLARE_CPU(CeilingKernel, ceiling_kernel, ())

}  // namespace memkernels
