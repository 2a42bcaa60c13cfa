// The chunk engine: a matrix for each head that decays and is added to along the sequence. Linear
// attention and the delta rule are its two uses.
#pragma once

#include <stddef.h>

#include "core/context.h"
#include "core/isa.h"
#include "core/tensor.h"
#include "scan/sequences.h"

namespace memkernels::scan {

struct ChunkScanArgs {
  TensorView q, k;           // [B, T, H, K]
  TensorView v;              // [B, T, HV, V]; value head h reads query head h / (HV / H)
  TensorView beta;           // [B, T, HV]: the delta rule; or absent: linear attention
  TensorView g;              // log decay [HV], [B, T, HV] or [B, T, HV, K], or absent: none
  TensorView initial_state;  // [N, HV, K, V], or absent: zeros
  TensorView initial_z;      // [N, HV, K], or absent: zeros
  TensorView cu_seqlens;     // [N + 1], or absent
  double scale = 1;
  bool normalize = false;
  double eps = 0;
  bool qk_l2norm = false;

  TensorView out;    // [B, T, HV, V], in the forward;
  TensorView state;  // [N, HV, K, V] and
  TensorView z;      // [N, HV, K], contiguous, written; or absent
};

void chunk_scan(const char* op, ChunkScanArgs args, const Context& ctx);

// Contiguous. Gradients are written, or absent; of accumulators those of gates, and those of q and
// k where value heads share them.
struct ChunkScanGrads {
  TensorView dout;            // [B, T, HV, V]
  TensorView dstate, dz;      // of the final state and z, or absent
  TensorView dq, dk;          // [B, T, HV, K]
  TensorView dv;              // [B, T, HV, V]
  TensorView dbeta;           // [B, T, HV]
  TensorView dg;              // [B, T, HV] or [B, T, HV, K]
  TensorView dinitial_state;  // [N, HV, K, V]
  TensorView dinitial_z;      // [N, HV, K]
};

void chunk_scan_backward(const char* op, ChunkScanArgs args, const ChunkScanGrads& grads,
                         const Context& ctx);

namespace cuda {
// Arguments are those that the CPU's check has left.
void chunk_scan(const char* op, const ChunkScanArgs& args, const Sequences& sequences,
                const Context& ctx);
void chunk_scan_backward(const char* op, const ChunkScanArgs& args, const ChunkScanGrads& grads,
                         const Sequences& sequences, const Context& ctx);
}  // namespace cuda

// A sequence of a value head.
struct ChunkTask {
  int64_t sequence, head;
  Span tokens;
};

struct ChunkScanKernel {
  int64_t panel;  // columns of V that are computed together, and apart from all others
  size_t (*scratch_bytes)(const ChunkScanArgs& args);
  // Columns of V in panels [begin, end); the first of them also writes z.
  void (*forward)(const ChunkScanArgs& args, const ChunkTask& task, int64_t begin, int64_t end,
                  void* scratch);
};

struct ChunkScanBackwardKernel {
  // longest: tokens of a sequence.
  size_t (*scratch_bytes)(const ChunkScanArgs& args, int64_t longest);
  void (*backward)(const ChunkScanArgs& args, const ChunkScanGrads& grads, const ChunkTask& task,
                   void* scratch);
};

MEMKERNELS_DECLARE_CPU(ChunkScanKernel, chunk_scan_kernel, (Dtype dtype))
MEMKERNELS_DECLARE_CPU(ChunkScanBackwardKernel, chunk_scan_backward_kernel, (Dtype dtype))

}  // namespace memkernels::scan
