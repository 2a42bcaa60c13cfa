// A step of an optimiser on some rows of a table, in place.
#pragma once

#include "core/context.h"
#include "core/isa.h"
#include "core/tensor.h"

namespace memkernels::lookup {

enum class Optimiser { sgd, adagrad, adam };

struct RowUpdateArgs {
  Optimiser optimiser = Optimiser::sgd;
  TensorView param;   // [N, D]
  TensorView first;   // adagrad: sum, [N, D] or one of each row [N]; adam: exp_avg [N, D]
  TensorView second;  // adam: exp_avg_sq [N, D]
  TensorView rows;    // [M], -1 is skipped
  TensorView grads;   // [M, D], accumulators
  TensorView count;   // [1]: how many of rows and grads are read
  double lr = 0, weight_decay = 0, eps = 0, beta1 = 0, beta2 = 0;
  int64_t step = 1;
};

void row_update(const char* op, const RowUpdateArgs& args, const Context& ctx);

namespace cuda {
void row_update(const char* op, const RowUpdateArgs& args, const Context& ctx);  // checked ones
}

// Entries [begin, end) of rows, which are different ones.
using RowUpdateKernel = void (*)(const RowUpdateArgs& args, const int64_t* rows, int64_t begin,
                                 int64_t end);

MEMKERNELS_DECLARE_CPU(RowUpdateKernel, row_update_kernel, (const RowUpdateArgs& args))

}  // namespace memkernels::lookup
