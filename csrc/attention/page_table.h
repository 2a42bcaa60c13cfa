// A page table and the lengths of its sequences, as ops read them on the host.
#pragma once

#include "core/check.h"

namespace memkernels::attention {

struct PageTable {
  const TensorView& pages;     // [B, max_pages]
  const TensorView& seq_lens;  // [B]
  int64_t page_size;

  int64_t batch() const { return seq_lens.shape[0]; }
  int64_t length(int64_t b) const { return index_at(seq_lens, b * seq_lens.stride[0]); }
  int64_t used(int64_t b) const { return length(b) / page_size + (length(b) % page_size != 0); }
  int64_t page(int64_t b, int64_t column) const {
    return index_at(pages, b * pages.stride[0] + column * pages.stride[1]);
  }

  void check_shapes(const char* op, Device device) const {
    check_shape(op, "page_table", pages, "[B, max_pages]", {-1, -1});
    check_shape(op, "seq_lens", seq_lens, "[B]", {pages.shape[0]});
    check_index(op, "page_table", pages);
    check_index(op, "seq_lens", seq_lens);
    check_device(op, "page_table", pages, device);
    check_device(op, "seq_lens", seq_lens, device);
  }

  // Refuses lengths that the table cannot hold, and pages that are neither -1 nor in the cache.
  void check_contents(const char* op, int64_t num_pages) const {
    for (int64_t b = 0; b < batch(); ++b) {
      check(length(b) >= 0, op, "seq_lens[", b, "] = ", length(b), " is negative");
      check(used(b) <= pages.shape[1], op, "seq_lens[", b, "] = ", length(b), " needs ", used(b),
            " pages of ", page_size, ", page_table has ", pages.shape[1], " columns");
      for (int64_t i = 0; i < used(b); ++i) {
        check(page(b, i) >= -1 && page(b, i) < num_pages, op, "page_table[", b, ", ", i,
              "] = ", page(b, i), " is outside [-1, ", num_pages, ")");
      }
    }
  }
};

}  // namespace memkernels::attention
