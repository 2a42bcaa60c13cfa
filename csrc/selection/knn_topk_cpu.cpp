// Scores of a block of entries for all queries of a task, then those entries that beat what a query
// has: of N scores some k (1 + ln(N / k)) do, and only these are written down.
//
// Cost: Q * N * D multiply-adds over N * D elements of the bank, each read once for the queries of
// a task. Few queries go straight from the bank, many are a blocked matrix product in which the
// entries are rows and the queries, packed once, columns.
#include "selection/knn_topk.h"

#include "attention/few_rows_cpu.h"
#include "selection/kth_largest_cpu.h"

namespace memkernels::selection {
namespace {

using attention::for_row_groups;
using attention::kBlockKeys;
using attention::kTileKeys;
using attention::score_tile;

// Up to here dot products beat the product's padding to whole panels.
constexpr int kFewQueries = 8;
// Entries of a block; whole tiles for the product.
constexpr int kBlockEntries = 96;
// Entries asked for ahead of the arithmetic.
constexpr int kAhead = 16;

template <class T>
struct Knn {
  using A = Acc<T>;
  using M = Math<T>;
  using Unit = typename M::Unit;
  static constexpr int W = kLanes<A>;

  struct Scratch {
    Unit* q;         // columns or rows of a product, of units of dim
    Unit* packed;    // [kBlockEntries] of units of dim
    A* scores;       // [kBlockEntries][kKnnQueries], or [kFewQueries][kBlockKeys]
    A* queries;      // [kKnnQueries]: what is measured of a query,
    A* entries;      // [kBlockEntries]: and of an entry
    A* floors;       // [kKnnQueries]: what an entry must exceed
    int32_t* found;  // [kKnnQueries]
    A* values;       // [kKnnQueries][room]
    Key<A>* keys;    // [room]
    int64_t* indices;
    const T** rows;  // of the bank, or of queries
    int64_t room;
    size_t bytes;
    Scratch(const KnnArgs& args, int64_t k, void* base) {
      const int64_t dim = round_up(args.q.shape[2], kPair<T>);
      room = k + (k > 128 ? k : 128);
      Arena arena{static_cast<char*>(base)};
      q = arena.take<Unit>(kKnnQueries * dim);
      packed = arena.take<Unit>(kBlockEntries * dim);
      scores = arena.take<A>(kBlockEntries * kKnnQueries);
      queries = arena.take<A>(kKnnQueries);
      entries = arena.take<A>(kBlockEntries);
      floors = arena.take<A>(kKnnQueries);
      found = arena.take<int32_t>(kKnnQueries);
      values = arena.take<A>(args.buckets > 0 ? 0 : kKnnQueries * room);
      indices = arena.take<int64_t>(args.buckets > 0 ? 0 : kKnnQueries * room);
      keys = arena.take<Key<A>>(room + W);
      rows = arena.take<const T*>(kBlockEntries);
      bytes = arena.used;
    }
  };

  static size_t scratch_bytes(const KnnArgs& args, int64_t room) {
    return Scratch(args, room, nullptr).bytes;
  }

  const KnnArgs& args;
  const KnnTask& task;
  const int64_t dim, padded_dim;
  const int64_t columns;  // of scores
  const Scratch s;
  const bool few;
  int64_t q_stride = 0;

  Knn(const KnnArgs& args, const KnnTask& task, void* scratch)
      : args(args),
        task(task),
        dim(args.q.shape[2]),
        padded_dim(round_up(dim, kPair<T>)),
        columns(round_up(task.num_queries, kPanel<A>)),
        s(args, task.room, scratch),
        few(task.num_queries <= kFewQueries) {}

  static void run(const KnnArgs& args, const KnnTask& task, void* scratch) {
    Knn self(args, task, scratch);
    self.pack_queries();
    if (args.buckets > 0) {
      self.search_buckets();
    } else {
      self.search();
    }
  }

  void pack_queries() {
    const T* q = static_cast<const T*>(args.q.data);
    const int64_t padded = few ? task.num_queries : columns;
    for (int64_t i = 0; i < padded; ++i) {
      s.rows[i] = i < task.num_queries
                      ? q + (task.first_query + i) * args.q.stride[0] + task.head * args.q.stride[1]
                      : nullptr;
    }
    for (int64_t i = 0; i < task.num_queries && args.metric != Metric::dot; ++i) {
      s.queries[i] = measure(s.rows[i]);
    }
    if (few) {
      q_stride = pack_a<T>(s.rows, padded, dim, s.q);
    } else {
      pack_b_transposed<T>(s.rows, padded, dim, s.q);
    }
  }

  const T* entry(int64_t i) const {
    return static_cast<const T*>(args.bank.data) + task.head * args.bank.stride[0] +
           i * args.bank.stride[1];
  }

  // ---- scores of entries [begin, begin + count), count <= block_entries() ----

  int64_t block_entries() const { return few ? kBlockKeys : kBlockEntries; }

  void score(int64_t begin, int64_t count) {
    for (int64_t i = 0; i < count && args.metric != Metric::dot; ++i) {
      s.entries[i] = measure(entry(begin + i));
    }
    if (few) {
      score_few(begin, count);
    } else {
      score_many(begin, count);
    }
  }

  // What the metric wants to know of a vector: 1 / |row| or |row|^2.
  A measure(const T* row) const {
    Vec<A> sums[2] = {}, x, y;
    for (int64_t d = 0; d < dim; d += kPair<T>) {
      load_chunk(row, d, dim, x, y);
      sums[0] += x * x;
      sums[1] += y * y;
    }
    const A square = sum<A>(sums[0] + sums[1]);
    if (args.metric == Metric::l2) return square;
    return square > 0 ? A(1) / static_cast<A>(__builtin_sqrt(square)) : A(0);
  }

  // Products of queries and entries to what ranks them, given what was measured of both.
  template <class Q, class E>
  MK_INLINE Vec<A> rank(Vec<A> products, Q query, E entry) const {
    if (args.metric == Metric::cosine) return products * entry * query;
    const Vec<A> negated = A(2) * products - entry - query;
    return negated > A(0) ? Vec<A>{} : negated;
  }

  void score_few(int64_t begin, int64_t count) {
    const T* rows[kBlockKeys];
    for (int64_t i = 0; i < kBlockKeys; ++i) rows[i] = entry(begin + (i < count ? i : 0));
    const int64_t row_bytes = dim * static_cast<int64_t>(sizeof(T));
    for_row_groups<A>(task.num_queries, [&](auto rows_at_once, int64_t r) {
      constexpr int R = decltype(rows_at_once)::value;
      constexpr int K = kTileKeys<T, R>;
      for (int64_t j = 0; j < count; j += K) {
        for (int i = 0; i < K && r == 0; ++i) {
          const char* later = reinterpret_cast<const char*>(rows[j + i]) +
                              kAhead * args.bank.stride[1] * static_cast<int64_t>(sizeof(T));
          for (int64_t n = 0; n < row_bytes; n += 64) prefetch_line(later + n);
        }
        score_tile<T, R>(s.q + r * q_stride, q_stride, rows + j, dim,
                         s.scores + r * kBlockKeys + j);
      }
    });
  }

  void score_many(int64_t begin, int64_t count) {
    const int64_t K = padded_dim / M::kElements;
    if constexpr (__is_same(T, A)) {
      if (count == kBlockEntries && dim == padded_dim) {
        matmul<M>(kBlockEntries, columns, K, entry(begin), args.bank.stride[1], 1, s.q, s.scores,
                  columns, false);
        return;
      }
    }
    for (int64_t i = 0; i < kBlockEntries; ++i) s.rows[i] = i < count ? entry(begin + i) : nullptr;
    const int64_t stride = pack_a<T>(s.rows, kBlockEntries, dim, s.packed);
    matmul<M>(kBlockEntries, columns, K, s.packed, stride, 1, s.q, s.scores, columns, false);
  }

  // Calls found(query, entry, value) for what exceeds the floor of its query, entries in order.
  template <class Found>
  MK_INLINE void for_found(int64_t begin, int64_t count, const Found& found) {
    const bool plain = args.metric == Metric::dot;
    if (few) {
      for (int64_t r = 0; r < task.num_queries; ++r) {
        for (int64_t j = 0; j < count; j += W) {
          Vec<A> x = load(s.scores + r * kBlockKeys + j);
          if (!plain) x = rank(x, s.queries[r], load(s.entries + j));
          uint32_t bits = lane_bits<A>(x > s.floors[r]);
          if (count - j < W) bits &= (uint32_t{1} << (count - j)) - 1;
          for (; bits != 0; bits &= bits - 1) {
            const int lane = __builtin_ctz(bits);
            if (x[lane] > s.floors[r]) found(r, begin + j + lane, x[lane]);
          }
        }
      }
      return;
    }
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t c = 0; c < columns; c += W) {
        Vec<A> x = load(s.scores + i * columns + c);
        if (!plain) x = rank(x, load(s.queries + c), s.entries[i]);
        uint32_t bits = lane_bits<A>(x > load(s.floors + c));
        for (; bits != 0; bits &= bits - 1) {
          const int lane = __builtin_ctz(bits);
          if (c + lane < task.num_queries) found(c + lane, begin + i, x[lane]);
        }
      }
    }
  }

  // ---- exact ----

  void search() {
    for (int64_t i = 0; i < kKnnQueries; ++i) {
      s.floors[i] = -kInfinity<A>;
      s.found[i] = 0;
    }
    const int64_t step = block_entries();
    for (int64_t begin = task.begin; begin < task.end && task.room > 0; begin += step) {
      const int64_t count = task.end - begin < step ? task.end - begin : step;
      score(begin, count);
      for_found(begin, count, [&](int64_t query, int64_t index, A value) {
        const int64_t at = query * s.room + s.found[query]++;
        s.values[at] = value;
        s.indices[at] = index;
        if (s.found[query] == s.room) keep_best(query);
      });
    }
    A* values = static_cast<A*>(task.values);
    for (int64_t query = 0; query < task.num_queries; ++query) {
      if (s.found[query] > task.room) keep_best(query);
      for (int64_t i = 0; i < task.room; ++i) {
        const bool any = i < s.found[query];
        values[query * task.room + i] = any ? s.values[query * s.room + i] : -kInfinity<A>;
        task.indices[query * task.room + i] = any ? s.indices[query * s.room + i] : -1;
      }
    }
  }

  // Keeps the best `task.room` of what a query has found, in the order of indices; what comes later
  // must beat the last of them.
  __attribute__((noinline)) void keep_best(int64_t query) {
    A* values = s.values + query * s.room;
    int64_t* indices = s.indices + query * s.room;
    const int64_t count = s.found[query];
    for (int64_t i = 0; i < count; ++i) s.keys[i] = key_of<A>(values[i]);
    const Key<A> cut = kth_largest<A>(s.keys, count, task.room);
    int64_t equal = task.room;
    for (int64_t i = 0; i < count; ++i) equal -= s.keys[i] > cut;
    int64_t kept = 0;
    A worst = kInfinity<A>;
    for (int64_t i = 0; i < count && kept < task.room; ++i) {
      if (s.keys[i] < cut || (s.keys[i] == cut && equal-- <= 0)) continue;
      values[kept] = values[i];
      indices[kept++] = indices[i];
      if (values[i] < worst) worst = values[i];
    }
    s.found[query] = static_cast<int32_t>(kept);
    s.floors[query] = worst;
  }

  // ---- the best of each bucket ----

  void search_buckets() {
    A* values = static_cast<A*>(task.values);
    for (int64_t i = 0; i < task.num_queries * task.room; ++i) {
      values[i] = -kInfinity<A>;
      task.indices[i] = -1;
    }
    for (int64_t i = 0; i < kKnnQueries; ++i) s.floors[i] = -kInfinity<A>;
    const int64_t step = block_entries();
    for (int64_t round = 0; round < task.valid_len; round += args.buckets) {
      const int64_t left = task.valid_len - round;
      const int64_t end = round + (left < task.end ? left : task.end);
      for (int64_t begin = round + task.begin; begin < end; begin += step) {
        score(begin, end - begin < step ? end - begin : step);
        for_found(begin, end - begin < step ? end - begin : step,
                  [&](int64_t query, int64_t index, A value) {
                    const int64_t at = query * task.room + index - round - task.begin;
                    if (value <= values[at]) return;
                    values[at] = value;
                    task.indices[at] = index;
                  });
      }
    }
  }
};

template <class T>
constexpr KnnKernel kernel_for() {
  return {Knn<T>::scratch_bytes, Knn<T>::run};
}

}  // namespace

namespace cpu::MEMKERNELS_ISA {

KnnKernel knn_kernel(Dtype dtype) {
  switch (dtype) {
    case Dtype::bf16:
      return kernel_for<bf16>();
    case Dtype::f16:
      return kernel_for<f16>();
#if defined(MEMKERNELS_BASELINE)
    case Dtype::f64:
      return kernel_for<double>();
#endif
    default:
      return kernel_for<float>();
  }
}

}  // namespace cpu::MEMKERNELS_ISA
}  // namespace memkernels::selection
