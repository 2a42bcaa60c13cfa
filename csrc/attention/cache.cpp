#include "attention/cache.h"

#include <cstring>
#include <utility>

#include "core/check.h"

namespace memkernels::attention {

void check_caches(const char* op, const TensorView& k_cache, const TensorView& v_cache) {
  check_floating(op, "k_cache", k_cache);
  check(k_cache.ndim == 4, op, "k_cache must be [num_pages, page_size, Hkv, D], got ",
        shape_of(k_cache));
  check(v_cache.ndim == 4, op, "v_cache must be [num_pages, page_size, Hkv, Dv], got ",
        shape_of(v_cache));
  for (int i = 0; i < 3; ++i) {
    check(v_cache.shape[i] == k_cache.shape[i], op, "v_cache ", shape_of(v_cache),
          " must match k_cache ", shape_of(k_cache), " but for its last dimension");
  }
  for (const auto& [arg, t] : {std::pair{"k_cache", &k_cache}, {"v_cache", &v_cache}}) {
    check_dtype(op, arg, *t, k_cache.dtype);
    check_rows_contiguous(op, arg, *t);
    check_device(op, arg, *t, k_cache.device);
  }
}

void copy_heads(const TokenHeads& from, const TokenHeads& to, int64_t heads, int64_t row) {
  if (from.head_stride == row && to.head_stride == row) {
    std::memcpy(to.data, from.data, heads * row);
    return;
  }
  for (int64_t h = 0; h < heads; ++h) {
    std::memcpy(to.data + h * to.head_stride, from.data + h * from.head_stride, row);
  }
}

}  // namespace memkernels::attention
