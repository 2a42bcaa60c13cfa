// The best-scored entries of rows: for attention to read (select_topk), or for a cache to keep
// (evict).
#pragma once

#include <stddef.h>

#include "core/context.h"
#include "core/isa.h"
#include "core/tensor.h"

namespace memkernels::selection {

struct SelectArgs {
  TensorView scores;   // [..., N]
  TensorView lengths;  // [...], or absent: N
  int64_t keep_first = 0, keep_last = 0;
  double threshold = -__builtin_inf();  // lower scores are not selected
  TensorView out;                       // [..., k] int32, contiguous, written
};

void select_topk(const SelectArgs& args, const Context& ctx);

struct EvictArgs {
  TensorView stats;     // [B, H, L]
  TensorView seq_lens;  // [B]
  TensorView budgets;   // [B], or absent: as many as `keep` has room for
  // [B, H] or absent: tokens that must be kept, the first and last among them; the statistics of
  // the others are +inf.
  TensorView num_protected;
  int64_t keep_first = 0, keep_last = 0;
  TensorView keep;  // [B, H, K] int32, contiguous, written
};

void evict(const EvictArgs& args, const Context& ctx);

namespace cuda {
void select_topk(const SelectArgs& args, const Context& ctx);  // checked ones
void evict(const EvictArgs& args, const Context& ctx);
}  // namespace cuda

// One row for the kernel.
struct SelectRow {
  const void* scores;
  int64_t length;
  int64_t keep_first, keep_last;
  int64_t k;      // how many are wanted, at most room
  int64_t room;   // entries of out
  bool any;       // -inf and NaN can be selected, the latter last
  double lowest;  // else scores above -inf that reach this
  int32_t* out;
};

struct SelectKernel {
  size_t (*scratch_bytes)(const SelectRow& largest);
  void (*run)(const SelectRow& row, void* scratch);
};

MEMKERNELS_DECLARE_CPU(SelectKernel, select_kernel, (Dtype dtype))

}  // namespace memkernels::selection
