// A feed-forward network of the neurons chosen for each token, and what flows back.
#pragma once

#include <stddef.h>

#include "core/context.h"
#include "core/isa.h"
#include "core/tensor.h"
#include "lookup/lists.h"

namespace memkernels::lookup {

enum class Activation { gelu, gelu_tanh, silu, relu, none };

struct SparseFfnArgs {
  TensorView x;        // [T, D]
  TensorView up;       // [N, D]
  TensorView down;     // [N, Dout]
  TensorView indices;  // [T, K]; -1 is skipped
  TensorView weights;  // [T, K], or absent: 1
  Activation activation = Activation::gelu;
  TensorView out;  // [T, Dout], contiguous, written
};

void sparse_ffn(const SparseFfnArgs& args, const Context& ctx);

struct SparseFfnGrads {
  TensorView dy;        // [T, Dout], in: `out` of the arguments is not used
  TensorView dx;        // [T, D], contiguous, written, or absent; written too are
  TensorView dweights;  // [T, K] accumulators;
  // [T, K] accumulators: a row of up's gradient is the sum of up_factors times the tokens x that
  // chose it, one of down's that of down_factors times dy.
  TensorView up_factors, down_factors;
};

void sparse_ffn_backward(const SparseFfnArgs& args, const SparseFfnGrads& grads,
                         const Context& ctx);

namespace cuda {
void sparse_ffn(const SparseFfnArgs& args, const Context& ctx);  // checked ones
void sparse_ffn_backward(const SparseFfnArgs& args, const SparseFfnGrads& grads,
                         const Context& ctx);
}  // namespace cuda

struct SparseFfnKernel {
  size_t (*scratch_bytes)(const SparseFfnArgs& args);
  // Tokens [begin, end). `lists` are the neurons of each token, with their weights as factors.
  void (*forward)(const SparseFfnArgs& args, const Lists& lists, int64_t begin, int64_t end,
                  void* scratch);
  void (*backward)(const SparseFfnArgs& args, const SparseFfnGrads& grads, const Lists& lists,
                   int64_t begin, int64_t end, void* scratch);
};

MEMKERNELS_DECLARE_CPU(SparseFfnKernel, sparse_ffn_kernel, (Dtype dtype))

}  // namespace memkernels::lookup
