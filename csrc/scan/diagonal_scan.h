// A linear recurrence of each channel, with the decay itself given.
#pragma once

#include "core/context.h"
#include "core/isa.h"
#include "core/tensor.h"
#include "scan/sequences.h"

namespace memkernels::scan {

// Complex numbers are pairs, in a last dimension of 2.
struct DiagonalScanArgs {
  TensorView x;              // [B, T, D]
  TensorView a;              // [B, T, D] or [D]
  TensorView initial_state;  // [N, D], or absent
  TensorView reset;          // [B, T] u8, or absent
  Sequences sequences;
  TensorView h;      // [B, T, D], contiguous
  TensorView state;  // [N, D], contiguous, or absent
};

void diagonal_scan(const DiagonalScanArgs& args, const Context& ctx);

struct DiagonalScanGrads {
  TensorView dh;      // [B, T, D]
  TensorView dstate;  // [N, D], or absent
  // Written, contiguous; or absent.
  TensorView dx;              // [B, T, D]
  TensorView da;              // [B, T, D], or [N, D] accumulators for a [D]
  TensorView dinitial_state;  // [N, D]
};

// args: without x.
void diagonal_scan_backward(const DiagonalScanArgs& args, const DiagonalScanGrads& grads,
                            const Context& ctx);

namespace cuda {  // of checked ones
void diagonal_scan(const DiagonalScanArgs& args, const Context& ctx);
void diagonal_scan_backward(const DiagonalScanArgs& args, const DiagonalScanGrads& grads,
                            const Context& ctx);
}  // namespace cuda

// Elements [begin, end) of the D (2 D, if complex) of a sequence; scratch: 3 accumulators of each.
struct DiagonalScanKernel {
  void (*forward)(const DiagonalScanArgs&, int64_t sequence, int64_t begin, int64_t end,
                  void* scratch);
  void (*backward)(const DiagonalScanArgs&, const DiagonalScanGrads&, int64_t sequence,
                   int64_t begin, int64_t end, void* scratch);
};

MEMKERNELS_DECLARE_CPU(DiagonalScanKernel, diagonal_scan_kernel, (Dtype dtype, bool complex))

}  // namespace memkernels::scan
