// Summaries of the keys of pages: of all (summarize_keys), or of those that hold new tokens
// (update_summaries).
#pragma once

#include <stddef.h>

#include "core/context.h"
#include "core/isa.h"
#include "core/tensor.h"

namespace memkernels::selection {

enum class SummaryKind { minmax, mean };

struct SummarizeKeysArgs {
  TensorView k_cache;     // [num_pages, page_size, Hkv, D]
  TensorView page_table;  // [B, max_pages]
  TensorView seq_lens;    // [B]
  SummaryKind kind = SummaryKind::minmax;
  TensorView summary;  // contiguous: minmax [num_pages, Hkv, 2, D] in k_cache's dtype,
                       //   mean [num_pages, Hkv, D] in float32 (float64 for float64)
};

void summarize_keys(const SummarizeKeysArgs& args, const Context& ctx);

// How many of the tokens of each sequence are new.
struct NewTokens {
  TensorView each;  // [B], or absent:
  int64_t all = 0;
};

void update_summaries(const SummarizeKeysArgs& args, const NewTokens& added, const Context& ctx);

namespace cuda {
// Checked ones. `added`: updates the pages that hold such tokens; null: summarizes all.
void summarize_keys(const char* op, const SummarizeKeysArgs& args, const NewTokens* added,
                    const Context& ctx);
}  // namespace cuda

// The first `tokens` keys of a page, for all heads; 0 if there are none.
struct SummaryPage {
  const void* keys;
  int64_t tokens;
  int64_t token_stride, head_stride;  // in elements
  int64_t heads, dim;
  void* summary;
};

struct SummaryKernel {
  size_t (*scratch_bytes)(int64_t heads, int64_t dim);
  void (*run)(const SummaryPage& page, SummaryKind kind, void* scratch);
};

MEMKERNELS_DECLARE_CPU(SummaryKernel, summary_kernel, (Dtype dtype))

}  // namespace memkernels::selection
