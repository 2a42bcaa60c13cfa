// score = reduce over the group of scale * (q . summary), where for "minmax" a query is the row
// [min(q, 0), max(q, 0)] beside [minima, maxima]: one dot product of twice the width.
//
// Cost: every summary is read once for all queries of a task and all heads, with as many
// multiply-adds an element as there are queries times heads in a group. A block of pages is taken
// head by head, so that the queries of one head stay in L1, while the next block is asked for in
// the order in which it lies in memory.
#include "attention/few_rows_cpu.h"
#include "selection/score_pages.h"

namespace memkernels::selection {
namespace {

using attention::for_row_groups;
using attention::kTileKeys;
using attention::score_tile;

constexpr int kBlockPages = 16;

template <class Q, class S>
struct Score {
  using A = Acc<S>;
  using Unit = typename Math<S>::Unit;
  const ScorePagesArgs& a;
  const ScoreTask& task;
  const int64_t heads, group, dim, width;  // width: of a summary
  const int64_t rows;                      // queries times group

  struct Scratch {
    Unit* q;    // [heads][rows][units of width]
    A* scores;  // [rows][kBlockKeys]
    S* row;     // [width]: a query
    S* zeros;   // [width]
    size_t bytes;
    Scratch(const ScorePagesArgs& a, int64_t num_queries, void* base) {
      const int64_t width = a.q.shape[2] * (a.kind == SummaryKind::minmax ? 2 : 1);
      const int64_t rows = num_queries * (a.q.shape[1] / a.summary.shape[1]);
      Arena arena{static_cast<char*>(base)};
      q = arena.take<Unit>(a.summary.shape[1] * rows * round_up(width, kPair<S>));
      scores = arena.take<A>(rows * attention::kBlockKeys);
      row = arena.take<S>(width);
      zeros = arena.take<S>(width);
      bytes = arena.used;
    }
  };
  const Scratch s;
  int64_t q_stride = 0;

  Score(const ScoreTask& task, void* scratch)
      : a(*task.args),
        task(task),
        heads(a.summary.shape[1]),
        group(a.q.shape[1] / heads),
        dim(a.q.shape[2]),
        width(dim * (a.kind == SummaryKind::minmax ? 2 : 1)),
        rows(task.num_queries * group),
        s(a, task.num_queries, scratch) {}

  static size_t scratch_bytes(const ScorePagesArgs& a, int64_t num_queries) {
    return Scratch(a, num_queries, nullptr).bytes;
  }

  static void run(const ScoreTask& task, void* scratch) { Score(task, scratch).run(); }

  // The query as the row that is multiplied with summaries.
  void write_row(const Q* q) const {
    constexpr int W = kLanes<A>;
    constexpr int step = __is_same(Q, S) ? kPair<S> : W;
    const Vec<A> zero{};
    // What is negative beside minima, what is positive beside maxima; a NaN beside both.
    const auto write = [&](int64_t d, const Q* from, S* low, S* high) {
      if constexpr (step == W) {
        const Vec<A> x = load_ordered(from + d);
        if (a.kind == SummaryKind::mean) return store(low + d, x);
        store(low + d, x > zero ? zero : x);
        store(high + d, x < zero ? zero : x);
      } else {
        Vec<A> x, y;
        load_pair(from + d, x, y);
        if (a.kind == SummaryKind::mean) return store_pair(low + d, x, y);
        store_pair(low + d, x > zero ? zero : x, y > zero ? zero : y);
        store_pair(high + d, x < zero ? zero : x, y < zero ? zero : y);
      }
    };
    int64_t d = 0;
    for (; d + step <= dim; d += step) write(d, q, s.row, s.row + dim);
    if (d == dim) return;
    Q rest[step] = {};
    S low[step], high[step];
    memcpy(static_cast<void*>(rest), q + d, (dim - d) * sizeof(Q));
    write(0, rest, low, high);
    memcpy(static_cast<void*>(s.row + d), low, (dim - d) * sizeof(S));
    if (a.kind == SummaryKind::mean) return;
    memcpy(static_cast<void*>(s.row + dim + d), high, (dim - d) * sizeof(S));
  }

  void pack_queries() {
    const Q* q = static_cast<const Q*>(a.q.data);
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t r = 0; r < rows; ++r) {
        write_row(q + (task.first_query + r / group) * a.q.stride[0] +
                  (h * group + r % group) * a.q.stride[1]);
        const S* packed = s.row;
        q_stride = round_up(width, kPair<S>) / Math<S>::kElements;
        pack_a<S>(&packed, 1, width, s.q + (h * rows + r) * q_stride);
      }
    }
    memset(static_cast<void*>(s.zeros), 0, width * sizeof(S));
  }

  // Summaries of a block's pages for head 0; null where there is none.
  struct Block {
    const S* page[kBlockPages];
    int64_t begin, count;
  };

  Block block_at(int64_t begin) const {
    const int64_t end = task.first_page + task.num_pages;
    Block block{{}, begin, end - begin < kBlockPages ? end - begin : kBlockPages};
    const TensorView& table = a.page_table;
    for (int64_t i = 0; i < block.count; ++i) {
      const int64_t at = task.sequence * table.stride[0] + (begin + i) * table.stride[1];
      const int64_t page = attention::integer_at(table.data, table.dtype == Dtype::i64, at);
      if (page >= 0)
        block.page[i] = static_cast<const S*>(a.summary.data) + page * a.summary.stride[0];
    }
    return block;
  }

  void run() {
    pack_queries();
    const int64_t end = task.first_page + task.num_pages;
    Block block = block_at(task.first_page);
    for (int64_t begin = task.first_page; begin < end; begin += kBlockPages) {
      const Block next = begin + kBlockPages < end ? block_at(begin + kBlockPages) : Block{};
      Upcoming upcoming(next, a.summary.stride[1] == width ? heads * width : width, tiles());
      for (int64_t h = 0; h < heads; ++h) {
        score_block(block, h, upcoming);
        write(block, h);
      }
      block = next;
    }
  }

  // The lines of a block's summaries, asked for a few at a time in the order of addresses; where
  // heads lie apart, those of the first alone.
  struct Upcoming {
    const Block& block;
    const int64_t page_bytes, step_bytes;
    int64_t page = 0, at = 0;
    Upcoming(const Block& block, int64_t page_elements, int64_t tiles)
        : block(block),
          page_bytes(page_elements * static_cast<int64_t>(sizeof(S))),
          step_bytes(round_up((page_bytes * kBlockPages + tiles - 1) / tiles, 64)) {}
    MK_INLINE void prefetch() {
      for (int64_t left = step_bytes; left > 0 && page < block.count;) {
        const char* data = reinterpret_cast<const char*>(block.page[page]);
        const int64_t end = at + left < page_bytes ? at + left : page_bytes;
        for (int64_t n = at; n < end && data != nullptr; n += 64) prefetch_line(data + n);
        left -= end - at;
        at = end;
        if (at == page_bytes) {
          at = 0;
          ++page;
        }
      }
    }
  };

  void score_block(const Block& block, int64_t h, Upcoming& upcoming) const {
    const S* pages[kBlockPages + kLanes<A>];
    for (int i = 0; i < kBlockPages + kLanes<A>; ++i) {
      const bool absent = i >= block.count || block.page[i] == nullptr;
      pages[i] = absent ? s.zeros : block.page[i] + h * a.summary.stride[1];
    }
    const Unit* q = s.q + h * rows * q_stride;
    for_row_groups<A>(rows, [&](auto rows_at_once, int64_t r) {
      constexpr int R = decltype(rows_at_once)::value;
      for (int64_t i = 0; i < block.count; i += kTileKeys<S, R>) {
        upcoming.prefetch();
        score_tile<S, R>(q + r * q_stride, q_stride, pages + i, width,
                         s.scores + r * attention::kBlockKeys + i);
      }
    });
  }

  // Calls of score_tile for a block.
  int64_t tiles() const {
    int64_t count = 0;
    for_row_groups<A>(rows, [&](auto rows_at_once, int64_t) {
      count += kBlockPages / kTileKeys<S, decltype(rows_at_once)::value>;
    });
    return heads * count;
  }

  void write(const Block& block, int64_t h) const {
    const A scale = static_cast<A>(a.scale);
    const A share = a.reduce == GroupReduce::mean ? scale / static_cast<A>(group) : scale;
    A values[kBlockPages];
    for (int64_t i = 0; i < task.num_queries; ++i) {
      const A* scores = s.scores + i * group * attention::kBlockKeys;
      for (int j = 0; j < kBlockPages; j += kLanes<A>) {
        Vec<A> value = load(scores + j) * share;
        for (int64_t g = 1; g < group; ++g) {
          const Vec<A> other = load(scores + g * attention::kBlockKeys + j) * share;
          if (a.reduce != GroupReduce::max) {
            value += other;
          } else {  // a NaN stays
            value = (other > value) | (other != other) ? other : value;
          }
        }
        store(values + j, value);
      }
      for (int64_t j = 0; j < block.count; ++j) {
        const bool hidden = a.causal && (block.begin + j) * a.page_size > task.position + i;
        if (block.page[j] == nullptr || hidden) values[j] = -kInfinity<A>;
      }
      memcpy(static_cast<A*>(a.scores.data) +
                 ((task.first_query + i) * heads + h) * a.scores.shape[2] + block.begin,
             values, block.count * sizeof(A));
    }
  }
};

template <class Q, class S = Q>
constexpr ScoreKernel kernel_for() {
  return {Score<Q, S>::scratch_bytes, Score<Q, S>::run};
}

}  // namespace

namespace cpu::MEMKERNELS_ISA {

ScoreKernel score_kernel(Dtype q, Dtype summary) {
  switch (q) {
    case Dtype::bf16:
      return summary == Dtype::f32 ? kernel_for<bf16, float>() : kernel_for<bf16>();
    case Dtype::f16:
      return summary == Dtype::f32 ? kernel_for<f16, float>() : kernel_for<f16>();
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
