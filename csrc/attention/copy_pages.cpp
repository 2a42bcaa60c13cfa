#include "attention/copy_pages.h"

#include <algorithm>
#include <vector>

#include "attention/cache.h"
#include "core/check.h"
#include "core/cuda/host_copy.h"
#include "core/memory.h"

namespace memkernels::attention {

namespace {

constexpr char kOp[] = "copy_pages";

struct Pair {
  int64_t source, destination;
};

// Refuses pairs whose result would depend on their order.
std::vector<Pair> checked_pairs(const CopyPagesArgs& a) {
  const int64_t num_pages = a.k_cache.shape[0], n = a.pairs.shape[0];
  std::vector<Pair> pairs;
  std::vector<int64_t> sources, destinations;
  for (int64_t i = 0; i < n; ++i) {
    int64_t ends[2];
    for (int side = 0; side < 2; ++side) {
      ends[side] = index_at(a.pairs, i * a.pairs.stride[0] + side * a.pairs.stride[1]);
      check(ends[side] >= -1 && ends[side] < num_pages, kOp, "pairs[", i, ", ", side,
            "] = ", ends[side], " is outside [-1, ", num_pages, ")");
    }
    if (ends[0] < 0 || ends[1] < 0) continue;
    pairs.push_back({ends[0], ends[1]});
    sources.push_back(ends[0]);
    destinations.push_back(ends[1]);
  }
  std::sort(sources.begin(), sources.end());
  std::sort(destinations.begin(), destinations.end());
  const auto twice = std::adjacent_find(destinations.begin(), destinations.end());
  check(twice == destinations.end(), kOp, "pairs has destination ",
        twice == destinations.end() ? 0 : *twice, " twice");
  for (const int64_t page : destinations) {
    check(!std::binary_search(sources.begin(), sources.end(), page), kOp, "pairs has page ", page,
          " as source and as destination");
  }
  return pairs;
}

void copy_page(const TensorView& cache, const Pair& pair) {
  const int64_t size = item_size(cache.dtype), token = cache.stride[1] * size;
  char* const data = static_cast<char*>(cache.data);
  char* from = data + pair.source * cache.stride[0] * size;
  char* to = data + pair.destination * cache.stride[0] * size;
  const int64_t head = cache.stride[2] * size, row = cache.shape[3] * size;
  for (int64_t t = 0; t < cache.shape[1]; ++t) {
    for (int64_t h = 0; h < cache.shape[2]; ++h) {
      const int64_t at = t * token + h * head;
      copy_around_caches(to + at, from + at, row);
    }
  }
}

}  // namespace

void copy_pages(const CopyPagesArgs& a, const Context& ctx) {
  check_caches(kOp, a.k_cache, a.v_cache);
  check_shape(kOp, "pairs", a.pairs, "[n, 2]", {-1, 2});
  check_index(kOp, "pairs", a.pairs);
  check_device(kOp, "pairs", a.pairs, a.k_cache.device);
#ifdef MEMKERNELS_WITH_CUDA
  if (ctx.device.type == DeviceType::cuda) {
    if (ctx.check_indices) {
      HostCopies copies(kOp, ctx);
      CopyPagesArgs read = a;
      copies.replace(read.pairs);
      checked_pairs(read);
    }
    return cuda::copy_pages(a, ctx);
  }
#endif
  const std::vector<Pair> pairs = checked_pairs(a);
  const int64_t n = pairs.size();
  run_tasks(ctx, n > 1 ? ctx.num_workers : 1, n, [&](int64_t i, int) {
    copy_page(a.k_cache, pairs[i]);
    copy_page(a.v_cache, pairs[i]);
    finish_copies_around_caches();
  });
}

}  // namespace memkernels::attention
