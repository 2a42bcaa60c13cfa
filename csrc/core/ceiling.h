// This machine's limits, measured with the means of the kernels: the same workers and vectors.
#pragma once

#include "core/context.h"
#include "core/isa.h"

namespace memkernels {

// Reads the whole contiguous tensor once; returns a sum that depends on all of it.
double read_ceiling(const TensorView& t, const Context& ctx);

// Reads rows of its first dimension, each contiguous, in the given order [n] of int64.
double gather_ceiling(const TensorView& t, const TensorView& order, const Context& ctx);

// Reads and writes the whole contiguous tensor once, in place.
void update_ceiling(const TensorView& t, const Context& ctx);

// Runs independent multiply-adds in registers on every worker, `rounds` of them each; in the format
// kernels use for `dtype` (bfloat16 dot products where the CPU has them). Returns the flops done.
double flop_ceiling(Dtype dtype, int64_t rounds, const Context& ctx);

struct CeilingKernel {
  double (*read)(const char* data, int64_t bytes);
  double (*gather)(const char* data, int64_t row_bytes, const int64_t* rows, int64_t num_rows);
  void (*update)(char* data, int64_t bytes);
  double (*flops)(Dtype dtype, int64_t rounds, double* sink);
};

MEMKERNELS_DECLARE_CPU(CeilingKernel, ceiling_kernel, ())

}  // namespace memkernels
