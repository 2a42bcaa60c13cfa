// Token keep[b, h, i] of sequence b and head h moves to position i <= keep[b, h, i]: walking i
// upwards, nothing is overwritten before it has moved.
//
// Cost: the kept tokens are read once and written once. Writes go around the caches, which saves
// reading what is about to be overwritten.
#include "attention/compact_kv.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "attention/cache.h"
#include "attention/page_table.h"
#include "core/check.h"
#include "core/cuda/host_copy.h"
#include "core/memory.h"
#include "core/prefetch.h"

namespace memkernels::attention {

namespace {

constexpr char kOp[] = "compact_kv";

// How far ahead of the copying tokens are asked for.
constexpr int64_t kAheadBytes = 4096;

PageTable table_of(const CompactKvArgs& a) {
  return {a.page_table, a.seq_lens, a.k_cache.shape[1]};
}

// Returns whether any page is absent.
bool check_pages(const CompactKvArgs& a) {
  const PageTable table = table_of(a);
  table.check_contents(kOp, a.k_cache.shape[0]);
  bool absent = false;
  std::vector<bool> used(a.k_cache.shape[0]);
  for (int64_t b = 0; b < table.batch(); ++b) {
    for (int64_t i = 0; i < table.used(b); ++i) {
      const int64_t page = table.page(b, i);
      absent |= page < 0;
      if (page < 0) continue;
      check(!used[page], kOp, "page_table[", b, ", ", i, "] = ", page,
            " is in use twice; copy shared pages first");
      used[page] = true;
    }
  }
  return absent;
}

// What is kept, as [B][heads][K] and how many of each sequence.
struct Kept {
  std::vector<int64_t> tokens;
  std::vector<int64_t> counts;
};

Kept checked_keep(const CompactKvArgs& a, bool absent_pages) {
  const int64_t batch = a.keep.shape[0], heads = a.keep.shape[1], most = a.keep.shape[2];
  const PageTable table = table_of(a);
  Kept kept;
  kept.tokens.resize(batch * heads * most);
  kept.counts.resize(batch);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = table.length(b);
    for (int64_t h = 0; h < heads; ++h) {
      int64_t* tokens = &kept.tokens[(b * heads + h) * most];
      int64_t count = 0, last = -1;
      for (int64_t i = 0; i < most; ++i) {
        const int64_t token =
            index_at(a.keep, b * a.keep.stride[0] + h * a.keep.stride[1] + i * a.keep.stride[2]);
        tokens[i] = token;
        if (token == -1) continue;
        check(token >= 0 && token < length, kOp, "keep[", b, ", ", h, ", ", i, "] = ", token,
              " is outside [-1, ", length, ")");
        check(count == i && token > last, kOp, "keep[", b, ", ", h, ", ", i, "] = ", token,
              " must be more than its predecessor, ", i == 0 ? -1 : tokens[i - 1]);
        check(!absent_pages || table.page(b, token / table.page_size) >= 0, kOp, "keep[", b, ", ",
              h, ", ", i, "] = ", token, " lies on an absent page");
        last = token;
        ++count;
      }
      if (h == 0) kept.counts[b] = count;
      check(count == kept.counts[b], kOp, "keep[", b, ", ", h, "] has ", count, " tokens, head 0 ",
            kept.counts[b]);
    }
    for (int64_t i = 0; i < kept.counts[b]; i += table.page_size) {
      const int64_t column = i / table.page_size;
      check(table.page(b, column) >= 0, kOp, "page_table[", b, ", ", column,
            "] = -1: kept tokens would move to an absent page");
    }
  }
  return kept;
}

// Tokens of one sequence in one cache, found faster when they are asked for in rising order.
class TokenFinder {
 public:
  TokenFinder(const CompactKvArgs& a, const TensorView& cache, int64_t b)
      : a_(a), cache_(cache), b_(b) {}

  char* at(int64_t token) {
    if (token >= end_) {
      const int64_t page_size = cache_.shape[1], column = token / page_size;
      end_ = (column + 1) * page_size;
      const int64_t first =
          table_of(a_).page(b_, column) * cache_.stride[0] - column * page_size * cache_.stride[1];
      origin_ = first * item_size(cache_.dtype);
      step_ = cache_.stride[1] * item_size(cache_.dtype);
    }
    return static_cast<char*>(cache_.data) + origin_ + token * step_;
  }

 private:
  const CompactKvArgs& a_;
  const TensorView& cache_;
  const int64_t b_;
  int64_t end_ = 0, origin_ = 0, step_ = 0;
};

}  // namespace

void compact_kv(const CompactKvArgs& a, const Context& ctx) {
  check_caches(kOp, a.k_cache, a.v_cache);
  check(a.k_cache.shape[1] > 0, kOp, "k_cache has page_size 0");
  table_of(a).check_shapes(kOp, a.k_cache.device);
  const int64_t batch = a.page_table.shape[0], heads = a.k_cache.shape[2];
  check_shape(kOp, "keep", a.keep, "[B, Hkv, K]", {batch, -1, -1});
  const int64_t keep_heads = a.keep.shape[1], most = a.keep.shape[2];
  check(keep_heads == heads || keep_heads == 1, kOp, "keep must be [B, Hkv, K] or [B, 1, K], got ",
        shape_of(a.keep), " for ", heads, " heads");
  check_index(kOp, "keep", a.keep);
  check_device(kOp, "keep", a.keep, a.k_cache.device);
#ifdef MEMKERNELS_WITH_CUDA
  if (ctx.device.type == DeviceType::cuda) {
    if (ctx.check_indices) {
      HostCopies copies(kOp, ctx);
      CompactKvArgs read = a;
      for (TensorView* t : {&read.page_table, &read.seq_lens, &read.keep}) copies.replace(*t);
      checked_keep(read, check_pages(read));
    }
    return cuda::compact_kv(a, ctx);
  }
#endif
  const Kept kept = checked_keep(a, check_pages(a));
  const DistinctCaches caches = distinct_caches(kOp, a.k_cache, a.v_cache);

  // A task moves some heads of one sequence in one cache: all of them, unless workers would idle.
  int64_t groups = 1;
  const int64_t parts = batch * caches.count;
  while (groups * 2 <= heads && parts * groups < 2 * ctx.num_workers) groups *= 2;
  const int64_t per_group = (heads + groups - 1) / groups;

  run_tasks(ctx, ctx.num_workers, parts * groups, [&](int64_t task, int) {
    const int64_t h0 = task % groups * per_group, h1 = std::min(heads, h0 + per_group);
    const int64_t b = task / groups % batch;
    const TensorView& cache = *caches.cache[task / groups / batch];
    const int64_t row = cache.shape[3] * item_size(cache.dtype);
    const int64_t head_stride = cache.stride[2] * item_size(cache.dtype);
    const int64_t count = kept.counts[b], ahead = 1 + kAheadBytes / ((h1 - h0) * row + 1);
    TokenFinder to(a, cache, b);
    std::vector<TokenFinder> from(keep_heads, to), next(keep_heads, to);
    for (int64_t i = 0; i < count; ++i) {
      char* const target = to.at(i);
      for (int64_t h = h0; h < h1; ++h) {
        const int64_t keeper = keep_heads == 1 ? 0 : h;
        const int64_t* tokens = &kept.tokens[(b * keep_heads + keeper) * most];
        const char* upcoming = next[keeper].at(tokens[std::min(i + ahead, count - 1)]);
        for (int64_t line = 0; line < row; line += 64) {
          prefetch_line(upcoming + h * head_stride + line);
        }
        const char* source = from[keeper].at(tokens[i]);
        if (source == target) continue;
        copy_around_caches(target + h * head_stride, source + h * head_stride, row);
      }
    }
    finish_copies_around_caches();
  });
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t at = b * a.new_seq_lens.stride[0];
    if (a.new_seq_lens.dtype == Dtype::i64) {
      static_cast<int64_t*>(a.new_seq_lens.data)[at] = kept.counts[b];
    } else {
      static_cast<int32_t*>(a.new_seq_lens.data)[at] = static_cast<int32_t>(kept.counts[b]);
    }
  }
}

}  // namespace memkernels::attention
