// Keeps chosen tokens of each sequence and moves them together, in place.
#pragma once

#include "core/context.h"
#include "core/tensor.h"

namespace memkernels::attention {

struct CompactKvArgs {
  TensorView k_cache;       // [num_pages, page_size, Hkv, D], written
  TensorView v_cache;       // [num_pages, page_size, Hkv, Dv], written
  TensorView page_table;    // [B, max_pages]
  TensorView seq_lens;      // [B]
  TensorView keep;          // [B, Hkv or 1, K] tokens, ascending, then -1
  TensorView new_seq_lens;  // [B], dtype of seq_lens, written
};

void compact_kv(const CompactKvArgs& args, const Context& ctx);

namespace cuda {
void compact_kv(const CompactKvArgs& args, const Context& ctx);  // checked ones
}

}  // namespace memkernels::attention
