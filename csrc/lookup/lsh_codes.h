// Sign-bit addresses of hash tables, and how firmly they are held.
#pragma once

#include "core/context.h"
#include "core/isa.h"
#include "core/tensor.h"

namespace memkernels::lookup {

inline constexpr int kMostBits = 30;

struct LshCodesArgs {
  TensorView z;       // [T, tables, bits]
  TensorView codes;   // [T, tables] int32, contiguous
  TensorView scores;  // [T, tables], contiguous
};

void lsh_codes(const LshCodesArgs& args, const Context& ctx);

struct LshCodesGrads {
  TensorView dscores;  // [T, tables]
  TensorView dz;       // [T, tables, bits], contiguous
};

void lsh_codes_backward(const LshCodesArgs& args, const LshCodesGrads& grads, const Context& ctx);

namespace cuda {  // checked ones
void lsh_codes(const LshCodesArgs& args, const Context& ctx);
void lsh_codes_backward(const LshCodesArgs& args, const LshCodesGrads& grads, const Context& ctx);
}  // namespace cuda

// Both work on rows [begin, end) of the T * tables rows.
struct LshCodesKernel {
  void (*forward)(const LshCodesArgs&, int64_t begin, int64_t end);
  void (*backward)(const LshCodesArgs&, const LshCodesGrads&, int64_t begin, int64_t end);
};

MEMKERNELS_DECLARE_CPU(LshCodesKernel, lsh_codes_kernel, (Dtype dtype))

}  // namespace memkernels::lookup
