#include "attention/cache.h"

#include <algorithm>
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

DistinctCaches distinct_caches(const char* op, const TensorView& k, const TensorView& v) {
  const auto k_begin = reinterpret_cast<uintptr_t>(k.data);
  const auto v_begin = reinterpret_cast<uintptr_t>(v.data);
  const auto k_end = k_begin + k.shape[3] * item_size(k.dtype);
  const auto v_end = v_begin + v.shape[3] * item_size(v.dtype);
  if (!std::equal(k.stride, k.stride + 3, v.stride) || k_end <= v_begin || v_end <= k_begin) {
    return {2, {&k, &v}};
  }
  const bool k_holds_v = k_begin <= v_begin && v_end <= k_end;
  const bool v_holds_k = v_begin <= k_begin && k_end <= v_end;
  check(k_holds_v || v_holds_k, op,
        "v_cache overlaps k_cache: their rows must be apart, or one within the other");
  return {1, {k_holds_v ? &k : &v, nullptr}};
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
