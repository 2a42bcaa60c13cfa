#include "selection/knn_topk.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "attention/plan.h"
#include "core/check.h"
#include "core/cuda/host_copy.h"
#include "core/memory.h"

namespace memkernels::selection {

namespace {

constexpr char kOp[] = "knn_topk";

void check_arguments(const KnnArgs& a) {
  check_floating(kOp, "q", a.q);
  check_shape(kOp, "q", a.q, "[Q, H, D]", {-1, -1, -1});
  check_rows_contiguous(kOp, "q", a.q);
  check_shape(kOp, "bank", a.bank, "[H, N, D]", {a.q.shape[1], -1, a.q.shape[2]});
  check_dtype(kOp, "bank", a.bank, a.q.dtype);
  check_device(kOp, "bank", a.bank, a.q.device);
  check_rows_contiguous(kOp, "bank", a.bank);
  check(a.q.shape[2] >= 1, kOp, "q has head dim 0");
  if (!given(a.valid_len)) return;
  check_shape(kOp, "valid_len", a.valid_len, "[H]", {a.q.shape[1]});
  check_index(kOp, "valid_len", a.valid_len);
  check_device(kOp, "valid_len", a.valid_len, a.q.device);
}

int64_t valid_len(const KnnArgs& a, int64_t head) {
  const int64_t n = a.bank.shape[1];
  if (!given(a.valid_len)) return n;
  const int64_t length = index_at(a.valid_len, head * a.valid_len.stride[0]);
  check(length >= 0 && length <= n, kOp, "valid_len[", head, "] = ", length, " is outside [0, ", n,
        "]");
  return length;
}

#ifdef MEMKERNELS_WITH_CUDA
void check_contents(const KnnArgs& a, const Context& ctx) {
  HostCopies copies(kOp, ctx);
  KnnArgs read = a;
  copies.replace(read.valid_len);
  for (int64_t h = 0; h < a.q.shape[1]; ++h) valid_len(read, h);
}
#endif

template <class A>
struct Found {
  A value;
  int64_t index;
  bool operator<(const Found& other) const {
    return value > other.value || (value == other.value && index < other.index);
  }
};

// The best of what the tasks of one head have found for a query, in order.
template <class A>
void finish(const KnnArgs& a, const KnnTask* tasks, int64_t num_tasks, int64_t query,
            std::vector<Found<A>>& all) {
  const int64_t k = a.values.shape[2], head = tasks[0].head;
  all.clear();
  for (int64_t t = 0; t < num_tasks; ++t) {
    const int64_t at = (query - tasks[t].first_query) * tasks[t].room;
    for (int64_t i = 0; i < tasks[t].room; ++i) {
      const int64_t index = tasks[t].indices[at + i];
      if (index >= 0) all.push_back({static_cast<const A*>(tasks[t].values)[at + i], index});
    }
  }
  const int64_t count = std::min<int64_t>(k, static_cast<int64_t>(all.size()));
  std::partial_sort(all.begin(), all.begin() + count, all.end());
  const A sign = a.metric == Metric::l2 ? -1 : 1;
  const A worst = -sign * std::numeric_limits<A>::infinity();
  const int64_t out = (query * a.q.shape[1] + head) * k;
  for (int64_t i = 0; i < k; ++i) {
    const bool any = i < count;
    static_cast<A*>(a.values.data)[out + i] = any ? sign * all[i].value + 0 : worst;  // no -0
    static_cast<int64_t*>(a.indices.data)[out + i] = any ? all[i].index : -1;
  }
}

}  // namespace

void knn_topk(const KnnArgs& a, const Context& ctx) {
  check_arguments(a);
#ifdef MEMKERNELS_WITH_CUDA
  if (ctx.device.type == DeviceType::cuda) {
    if (ctx.check_indices) check_contents(a, ctx);
    return cuda::knn_topk(a, ctx);
  }
#endif
  const int64_t num_queries = a.q.shape[0], heads = a.q.shape[1], dim = a.q.shape[2];
  const int64_t k = a.values.shape[2];
  double entries = 0;
  std::vector<int64_t> lengths(heads);
  for (int64_t h = 0; h < heads; ++h) entries += lengths[h] = valid_len(a, h);
  if (num_queries == 0 || heads == 0 || k == 0) return;
  const int workers = attention::workers_for(ctx, entries * num_queries * dim);

  // Tasks of one head and block of queries lie together; enough of them for every worker.
  const int64_t query_blocks = (num_queries + kKnnQueries - 1) / kKnnQueries;
  const int64_t parts = std::max<int64_t>(1, 4 * workers / (heads * query_blocks));
  std::vector<KnnTask> tasks;
  std::vector<int64_t> first_task;
  int64_t found = 0, most_found = 0;
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t i = 0; i < num_queries; i += kKnnQueries) {
      const int64_t whole = a.buckets > 0 ? std::min(a.buckets, lengths[h]) : lengths[h];
      const int64_t least = a.buckets > 0 ? 256 : 2048;
      const int64_t part = std::max(least, (whole + parts - 1) / parts);
      first_task.push_back(static_cast<int64_t>(tasks.size()));
      const int64_t rows = std::min(kKnnQueries, num_queries - i), found_before = found;
      for (int64_t begin = 0; begin == 0 || begin < whole; begin += part) {
        const int64_t end = std::min(whole, begin + part);
        const int64_t room = a.buckets > 0 ? end - begin : std::min(k, end - begin);
        tasks.push_back({h, i, rows, begin, end, lengths[h], nullptr, nullptr, room});
        found += rows * room;
      }
      most_found = std::max(most_found, (found - found_before) / rows);
    }
  }
  first_task.push_back(static_cast<int64_t>(tasks.size()));

  const int64_t size = item_size(a.values.dtype);
  int64_t most_room = 0;
  for (const KnnTask& task : tasks) most_room = std::max(most_room, task.room);
  const Isa isa = isa_for(a.q.dtype);
  const KnnKernel kernel = MEMKERNELS_CPU(isa, knn_kernel)(a.q.dtype);
  const size_t scratch_bytes = align_up(kernel.scratch_bytes(a, most_room));
  const size_t value_bytes = align_up(found * size);
  const Workspace workspace =
      allocate_workspace(workers * scratch_bytes + value_bytes + found * sizeof(int64_t));
  char* scratch = static_cast<char*>(workspace.get());
  char* values = scratch + workers * scratch_bytes;
  int64_t* indices = reinterpret_cast<int64_t*>(values + value_bytes);
  for (KnnTask& task : tasks) {
    task.values = values;
    task.indices = indices;
    values += task.num_queries * task.room * size;
    indices += task.num_queries * task.room;
  }
  run_tasks(ctx, workers, static_cast<int64_t>(tasks.size()), [&](int64_t i, int worker) {
    kernel.run(a, tasks[i], scratch + worker * scratch_bytes);
  });

  const int64_t num_blocks = static_cast<int64_t>(first_task.size()) - 1;
  const auto finish_all = [&](auto zero) {
    using A = decltype(zero);
    std::vector<std::vector<Found<A>>> room(workers);
    for (auto& all : room) all.reserve(most_found);
    run_tasks(ctx, workers, num_blocks, [&](int64_t i, int worker) {
      const KnnTask* block = &tasks[first_task[i]];
      for (int64_t query = 0; query < block->num_queries; ++query) {
        finish<A>(a, block, first_task[i + 1] - first_task[i], block->first_query + query,
                  room[worker]);
      }
    });
  };
  a.q.dtype == Dtype::f64 ? finish_all(double{}) : finish_all(float{});
}

}  // namespace memkernels::selection
