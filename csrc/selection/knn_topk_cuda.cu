#include "selection/knn_topk_cuda.h"

#include <algorithm>

#include "selection/knn_topk_kernel.cuh"

namespace memkernels::selection::cuda {

namespace {

// Of lists, a multiprocessor; more queries than that take several launches.
constexpr int64_t kListBytes = 1 << 20;

bool aligned_to_16(const TensorView& t) {
  const int64_t numbers = t.stride[0] | t.stride[1] | t.shape[2];
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && numbers * item_size(t.dtype) % 16 == 0;
}

// Into how many parts to cut what each of `blocks` would do, for nearly the least number of rounds
// of `slots` blocks at a time; no more than `most`.
int64_t parts_for(int64_t blocks, int64_t slots, int64_t most) {
  int64_t parts = 1;
  const auto rounds = [&](int64_t n) { return ceil_div(blocks * n, slots); };
  for (int64_t n = 2; n <= most; ++n) {
    if (rounds(n) * parts * 20 < rounds(parts) * n * 17) parts = n;
  }
  return parts;
}

template <class T>
void launch_search(const char* op, const KnnParams& p, int rows, int64_t shared_bytes,
                   const Context& ctx) {
  const int64_t blocks = int64_t{p.query_blocks} * p.heads * p.stretches * p.parts;
  launch(op, ctx,
         rows == kBucketRows ? search_bank<T, kBucketRows, true>
         : rows == kFewRows  ? search_bank<T, kFewRows, false>
                             : search_bank<T, kManyRows, false>,
         blocks, kSearchThreads, shared_bytes, p);
}

KnnParams params_of(const char* op, const KnnArgs& a) {
  check_supported(op, "q", a.q);
  KnnParams p{};
  p.q_stride = a.q.stride[0];
  p.q_head_stride = a.q.stride[1];
  p.bank = a.bank.data;
  p.bank_head_stride = a.bank.stride[0];
  p.bank_stride = a.bank.stride[1];
  p.aligned = aligned_to_16(a.q) && aligned_to_16(a.bank);
  p.valid_len = integers(a.valid_len);
  p.metric = a.metric;
  p.heads = as_int(op, "heads", a.q.shape[1]);
  p.num_entries = as_int(op, "entries", a.bank.shape[1]);
  p.dim = as_int(op, "elements of a vector", a.q.shape[2]);
  p.slices = static_cast<int>(ceil_div(p.dim * item_size(a.q.dtype), kSliceBytes));
  p.k = a.values.shape[2];
  const int64_t found = std::min<int64_t>(p.k, p.num_entries);
  p.least = static_cast<int>(found);
  p.most = as_int(op, "results of a query", found + std::max<int64_t>(found / 4, 32));
  p.stretches = p.parts = 1;
  return p;
}

// Bytes of shared memory of a block of `rows` queries; sets q_stays.
int64_t plan_shared(KnnParams& p, int rows, int resident, const Limits& limits) {
  const int stages = stages_of(rows);
  const int64_t fixed = stages * kEntries * kSliceBytes + (3 * rows + kEntries + 2) * 4;
  const int64_t slice = rows * kSliceBytes;
  constexpr int64_t kReserved = 1024;  // of each block, by the system
  const int64_t budget = std::min(limits.of_block, limits.of_multiprocessor / resident - kReserved);
  p.q_stays = fixed + p.slices * slice <= budget;
  return fixed + (p.q_stays ? p.slices : stages) * slice;
}

// Cuts the bank for `blocks` blocks of queries, of which the device runs `slots` at a time. No
// stretch has less than a few tiles, more where many lists have to be cut back, and no query more
// lists than a block can go through to rank them.
void plan_lists(KnnParams& p, int64_t buckets, int rows, int64_t blocks, int64_t slots) {
  const bool bucketed = buckets > 0;
  const int64_t fold = bucketed ? std::max<int64_t>(1, kEntries / buckets) : 0;
  p.buckets = static_cast<int>(fold * buckets);
  const int64_t tiles = ceil_div(bucketed ? p.buckets : p.num_entries, kEntries);
  const int64_t lists = std::clamp<int64_t>((1 << 17) / p.most, 16, 1024);
  const int64_t most = std::min(lists, bucketed ? tiles : tiles / (rows == kManyRows ? 16 : 4));
  p.stretches = static_cast<int>(parts_for(blocks, slots, most));
  if (bucketed) {
    const int64_t rounds = ceil_div(p.num_entries, p.buckets);
    p.parts = static_cast<int>(std::clamp<int64_t>(slots / (blocks * p.stretches), 1, rounds));
    if (p.parts > 1 || fold > 1) p.distinct = static_cast<int>(buckets);
  }
  const int64_t stretch = std::max<int64_t>(1, ceil_div(tiles, p.stretches)) * kEntries;
  p.room = int64_t{p.least} + kEntries + std::max(p.least, 768);
  if (p.distinct > 0 || p.room > stretch) p.room = stretch;
}

}  // namespace

void knn_topk(const KnnArgs& a, const Context& ctx) {
  constexpr char op[] = "knn_topk";
  KnnParams p = params_of(op, a);
  const int64_t queries = a.q.shape[0], size = item_size(a.q.dtype);
  if (queries == 0 || p.heads == 0 || p.k == 0) return;
  const DeviceGuard guard(op, ctx.device);
  const Limits limits = limits_of(op, ctx.device);

  // As many buckets as entries are an exact search.
  const int64_t buckets = a.buckets < p.num_entries ? a.buckets : 0;
  const int rows = buckets > 0 ? kBucketRows : queries <= kFewRows ? kFewRows : kManyRows;
  const int resident = resident_blocks(static_cast<int>(size), rows);
  const int64_t shared_bytes = plan_shared(p, rows, resident, limits);
  plan_lists(p, buckets, rows, ceil_div(queries, rows) * p.heads,
             int64_t{limits.multiprocessors} * resident);

  const int64_t of_list = p.distinct > 0 ? p.distinct : std::min<int64_t>(p.room, p.most);
  const int64_t candidates = std::max<int64_t>(p.stretches * of_list, p.most);
  int threads = 32;
  while (threads < 1024 && 4 * threads < candidates) threads *= 2;
  int64_t rank_bytes = 33 * sizeof(Key);
  const int64_t best_bytes = p.most * sizeof(Key);
  const bool best_is_shared = rank_bytes + best_bytes <= limits.of_block;
  if (best_is_shared) rank_bytes += best_bytes;

  const int64_t query_lists = int64_t{p.heads} * p.stretches;
  const int64_t key_bytes = query_lists * p.parts * p.room * sizeof(Key);
  const int64_t query_bytes = key_bytes + (best_is_shared ? 0 : p.heads * best_bytes);
  const int64_t budget = limits.multiprocessors * kListBytes;
  const int64_t at_once =
      std::min(queries, std::max<int64_t>(1, budget / query_bytes / rows) * rows);
  p.keys = static_cast<Key*>(ctx.allocate(ctx, at_once * key_bytes));
  p.counts = static_cast<int*>(ctx.allocate(ctx, at_once * query_lists * sizeof(int)));
  if (!best_is_shared) {
    p.best = static_cast<Key*>(ctx.allocate(ctx, at_once * p.heads * best_bytes));
  }
  for (int64_t first = 0; first < queries; first += at_once) {
    p.num_queries = as_int(op, "queries", std::min(at_once, queries - first));
    p.query_blocks = static_cast<int>(ceil_div(p.num_queries, rows));
    p.q = static_cast<const char*>(a.q.data) + first * a.q.stride[0] * size;
    p.values = static_cast<float*>(a.values.data) + first * p.heads * p.k;
    p.indices = static_cast<int64_t*>(a.indices.data) + first * p.heads * p.k;
    with_type(a.q.dtype,
              [&](auto type) { launch_search<decltype(type)>(op, p, rows, shared_bytes, ctx); });
    launch(op, ctx, rank_found, int64_t{p.num_queries} * p.heads, threads, rank_bytes, p);
  }
}

}  // namespace memkernels::selection::cuda
