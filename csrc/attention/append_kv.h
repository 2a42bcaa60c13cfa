// Writes new keys and values into the slots of a paged cache.
#pragma once

#include "core/context.h"
#include "core/tensor.h"

namespace memkernels::attention {

struct AppendKvArgs {
  TensorView k;             // [T, Hkv, D]
  TensorView v;             // [T, Hkv, Dv]
  TensorView k_cache;       // [num_pages, page_size, Hkv, D], written
  TensorView v_cache;       // [num_pages, page_size, Hkv, Dv], written
  TensorView slot_mapping;  // [T]: page * page_size + offset, -1 skips
};

void append_kv(const AppendKvArgs& args, const Context& ctx);

namespace cuda {
void append_kv(const AppendKvArgs& args, const Context& ctx);  // checked ones
}

}  // namespace memkernels::attention
