// Gates a memory's value by how well its keys match the hidden states.
#pragma once

#include "core/context.h"
#include "core/isa.h"
#include "core/tensor.h"

namespace memkernels::lookup {

enum class ZeroSign { zero, copy };

struct EngramGateArgs {
  TensorView hidden, k;  // [T, C, D]
  TensorView v;          // [T, D]
  TensorView weight;     // [C, D]
  double eps = 1e-6;
  ZeroSign sign = ZeroSign::zero;
  TensorView out;  // [T, C, D], contiguous
};

void engram_gate(const EngramGateArgs& args, const Context& ctx);

struct EngramGateGrads {
  TensorView dout;  // [T, C, D]
  // Written, contiguous; or absent.
  TensorView dhidden, dk;  // [T, C, D]
  TensorView dv;           // [T, D]
  TensorView dweight;      // [C, D]
};

void engram_gate_backward(const EngramGateArgs& args, const EngramGateGrads& grads,
                          const Context& ctx);

namespace cuda {  // checked ones
void engram_gate(const EngramGateArgs& args, const Context& ctx);
void engram_gate_backward(const EngramGateArgs& args, const EngramGateGrads& grads,
                          const Context& ctx);
}  // namespace cuda

// All in accumulators. Of a block of tokens the backward leaves its own part of dweight.
struct EngramGateKernel {
  void (*forward)(const EngramGateArgs&, int64_t begin, int64_t end);
  // part: [C, D]; row: scratch [D].
  void (*backward)(const EngramGateArgs&, const EngramGateGrads&, int64_t begin, int64_t end,
                   void* part, void* row);
  // dweight at elements [begin, end): the sum of parts [num_parts, C, D].
  void (*add_parts)(const EngramGateGrads&, const void* parts, int64_t num_parts, int64_t begin,
                    int64_t end);
};

// weight: whether it is wider than `dtype`.
MEMKERNELS_DECLARE_CPU(EngramGateKernel, engram_gate_kernel, (Dtype dtype, bool wide_weight))

}  // namespace memkernels::lookup
