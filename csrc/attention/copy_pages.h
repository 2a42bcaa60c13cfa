// Copies pages of a paged cache onto others, for copy-on-write.
#pragma once

#include "core/context.h"
#include "core/tensor.h"

namespace memkernels::attention {

struct CopyPagesArgs {
  TensorView k_cache;  // [num_pages, page_size, Hkv, D], written
  TensorView v_cache;  // [num_pages, page_size, Hkv, Dv], written
  TensorView pairs;    // [n, 2]: source and destination page, -1 in either skips the pair
};

void copy_pages(const CopyPagesArgs& args, const Context& ctx);

namespace cuda {
void copy_pages(const CopyPagesArgs& args, const Context& ctx);  // checked ones
}

}  // namespace memkernels::attention
