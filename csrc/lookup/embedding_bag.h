// Weighted sums of the rows of a table, and what flows back to the rows and to their weights.
#pragma once

#include <stddef.h>

#include "core/context.h"
#include "core/isa.h"
#include "core/tensor.h"
#include "lookup/lists.h"

namespace memkernels::lookup {

// What each bag reads, as the caller gives it.
struct Bags {
  TensorView input;    // [T, K], or [n] with offsets
  TensorView offsets;  // [T], or absent
  TensorView factors;  // the shape of input, or absent: 1
};

struct EmbeddingBagArgs {
  Bags bags;
  TensorView weight;  // [N, D]; it and scales may be in the host's memory beside bags on CUDA
  TensorView scales;  // [N, D / block] of a quantised weight
  TensorView out;     // [T, D], contiguous, written
};

void embedding_bag(const EmbeddingBagArgs& args, const Context& ctx);

struct EmbeddingBagGrads {
  Bags bags;
  TensorView grad;  // [T, D], of the result
  // [N, D], zero or with `accumulate` not: what the gradient is added to.
  TensorView dense;
  bool accumulate = false;
  // Or rows [M] int64, their gradients [M, D] in the accumulator's dtype, on the CPU zero, and
  // their number.
  TensorView rows, grads, count;
};

void embedding_bag_backward(const char* op, const EmbeddingBagGrads& args, int64_t num_embeddings,
                            const Context& ctx);

namespace cuda {
void embedding_bag_backward(const char* op, const EmbeddingBagGrads& args, int64_t num_embeddings,
                            const Context& ctx);  // checked ones
}

struct EmbeddingBagWeightsArgs {
  Bags bags;          // without factors
  TensorView grad;    // [T, D]
  TensorView weight;  // [N, D]
  TensorView scales;  // [N, D / block] of a quantised weight
  TensorView out;     // the shape of input, contiguous, written
};

void embedding_bag_weights(const EmbeddingBagWeightsArgs& args, const Context& ctx);

namespace cuda {
void embedding_bag(const EmbeddingBagArgs& args, const Context& ctx);  // checked ones
void embedding_bag_weights(const EmbeddingBagWeightsArgs& args, const Context& ctx);
}  // namespace cuda

// ---- kernels -----------------------------------------------------------------------------------

// out[i] = sum of factors * table rows, over list i.
struct SumArgs {
  Lists lists;
  TensorView table;         // [N, D]
  TensorView scales;        // [N, D / block], or absent
  TensorView out;           // [*, D] in the dtype of table, or in its accumulator's
  const int64_t* out_rows;  // where in out; null: list i is row i
  bool accumulate;
};

struct SumKernel {
  size_t (*scratch_bytes)(int64_t dim);
  void (*run)(const SumArgs& args, const Cut& cut, void* scratch);
};

// out[e] = x[i] . table row, for every entry e of list i; 0 for -1.
struct ProductArgs {
  Lists lists;
  TensorView x;       // [lists, D], dtype of table, or float32 beside a quantised one
  TensorView table;   // [N, D]
  TensorView scales;  // [N, D / block], or absent
  void* out;          // [entries] accumulators
};

struct ProductKernel {
  size_t (*scratch_bytes)(int64_t dim);
  void (*run)(const ProductArgs& args, const Cut& cut, void* scratch);
};

// n numbers, one after the other, into float32.
using WidenKernel = void (*)(const void* from, int64_t n, float* to);

MEMKERNELS_DECLARE_CPU(WidenKernel, widen_kernel, (Dtype from))
MEMKERNELS_DECLARE_CPU(SumKernel, sum_rows_kernel, (Dtype table))
MEMKERNELS_DECLARE_CPU(ProductKernel, multiply_rows_kernel, (Dtype table))

}  // namespace memkernels::lookup
