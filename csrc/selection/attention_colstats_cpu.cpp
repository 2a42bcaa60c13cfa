// stats[b, h, j] = reduce over queries i and heads of the group of exp(logit_ij - lse_i).
//
// Cost: num_q * Hq * kv_len * D multiply-adds and as many exponentials as scores, over
// kv_len * Hkv * D elements of K, each read once: the half of attention that comes before V. Few
// rows (decode) go straight from the cache; many are products of packed blocks, of which those of
// the keys stay in L2 while all queries pass by.
#include "selection/attention_colstats.h"

#include "attention/few_rows_cpu.h"
#include "selection/packed_keys_cpu.h"

namespace memkernels::selection {
namespace {

using attention::all_visible;
using attention::for_row_groups;
using attention::kTileKeys;
using attention::score_tile;
using attention::to_logits;
using attention::visible_keys;

// Bytes of keys asked for ahead of the arithmetic.
constexpr int64_t kPrefetchBytes = 16384;

template <class T>
struct Colstats {
  using A = Acc<T>;
  using M = Math<T>;
  using Unit = typename M::Unit;

  struct Scratch {
    Unit* q;           // [heads][kFewRows] of units of dim
    A* scores;         // [heads][kFewRows][kBlockKeys]
    const T** q_rows;  // [kFewRows]
    T* zeros;          // a key
    A* addends;        // [kBlockKeys]
    A* columns;        // [keys]
    PackedKeys<T> keys;
    size_t bytes;
    Scratch(const Problem& p, Arena arena)
        : q(arena.take<Unit>(p.num_kv_heads * kFewRows * round_up(p.dim, kPair<T>))),
          scores(arena.take<A>(p.num_kv_heads * kFewRows * kBlockKeys)),
          q_rows(arena.take<const T*>(kFewRows)),
          zeros(arena.take<T>(p.dim)),
          addends(arena.take<A>(kBlockKeys)),
          columns(arena.take<A>(stretch_keys(p.dim))),
          keys(p, stretch_keys(p.dim), arena),
          bytes(arena.used) {}
  };

  static size_t scratch_bytes(const Problem& p) { return Scratch(p, Arena{nullptr}).bytes; }

  const Problem& p;
  const ColstatsArgs& args;
  const ColstatsTask& task;
  const Sequence& seq;
  Scratch s;
  int64_t q_stride = 0;

  static void run(const ColstatsJob& job, const ColstatsTask& task, void* scratch) {
    Colstats self(job, task, scratch);
    if (self.seq.num_q * self.p.group <= kFewRows) {
      self.few();
    } else {
      self.many();
    }
  }

  Colstats(const ColstatsJob& job, const ColstatsTask& task, void* scratch)
      : p(*job.problem),
        args(*job.args),
        task(task),
        seq(p.sequences[task.sequence]),
        s(p, Arena{static_cast<char*>(scratch)}) {}

  int64_t position(int64_t i) const { return seq.kv_len - seq.num_q + i; }

  A lse_of(int64_t i, int64_t head) const {
    return reinterpret_cast<const A*>(
        p.lse.data)[(seq.q_begin + i) * p.lse.token_stride + head * p.lse.head_stride];
  }

  // Reduces one row of scores q . k into the columns of its block.
  void add_row(A* scores, int64_t begin, int64_t i, int64_t head, int64_t kv_head, const A* addends,
               bool masked, A* columns) const {
    const A lse = lse_of(i, head);
    if (lse == -kInfinity<A>) return;
    const int64_t at = position(i);
    KeyRange seen{};
    if (masked) seen = visible_keys(p, kv_head, seq.kv_len, at, at);
    to_logits(scores, p, addends, begin, masked ? &seen : nullptr);
    const double given = args.threshold;
    const A least = static_cast<A>(given == given ? given : 1.0 / (at > 0 ? at + 1.0 : 1.0));
    const A largest = 88;  // what exp() takes; no probability comes near it
    for (int j = 0; j < kBlockKeys; j += kLanes<A>) {
      const Vec<A> logits = load(scores + j), x = logits - lse;
      const Lane<A> visible = logits != -kInfinity<A>;
      const Vec<A> probability = visible ? exp(x > largest ? splat(largest) : x) : Vec<A>{};
      const Vec<A> old = load(columns + j);
      switch (args.reduce) {
        case ColumnReduce::sum:
          store(columns + j, old + probability);
          break;
        case ColumnReduce::max:  // a NaN stays
          store(columns + j,
                (probability > old) | (probability != probability) ? probability : old);
          break;
        case ColumnReduce::count:
          store(columns + j, (probability >= least) & visible ? old + A(1) : old);
          break;
      }
    }
  }

  void write(int64_t head, int64_t begin, int64_t count, const A* columns) const {
    A* out = static_cast<A*>(args.stats.data) +
             (task.sequence * p.num_kv_heads + head) * args.stats.shape[2] + begin;
    const A decay = static_cast<A>(args.decay);
    for (int64_t j = 0; j < count; ++j) {
      if (!args.accumulate) {
        out[j] = columns[j];
      } else if (args.reduce == ColumnReduce::max) {
        const A old = decay * out[j];
        out[j] = columns[j] > old || columns[j] != columns[j] ? columns[j] : old;
      } else {
        out[j] = decay * out[j] + columns[j];
      }
    }
  }

  bool masked(int64_t head, int64_t i0, int64_t i1, int64_t begin, int64_t count) const {
    return !all_visible(p, head, seq.kv_len, position(i0), position(i1 - 1), begin, count);
  }

  // ---- few rows ----

  void few() {
    const int64_t rows = seq.num_q * p.group, heads = task.h1 - task.h0;
    const int64_t dim = round_up(p.dim, kPair<T>);
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t r = 0; r < rows; ++r) {
        s.q_rows[r] = reinterpret_cast<const T*>(p.q.data) +
                      (seq.q_begin + r / p.group) * p.q.token_stride +
                      ((task.h0 + h) * p.group + r % p.group) * p.q.head_stride;
      }
      q_stride = pack_a<T>(s.q_rows, rows, p.dim, s.q + h * kFewRows * dim);
    }
    memset(static_cast<void*>(s.zeros), 0, p.dim * sizeof(T));
    const KeyRange seen =
        visible_keys(p, task.h0, seq.kv_len, position(0), position(seq.num_q - 1));
    KeyBlock<T> blocks[2];
    int current = 0;
    locate(blocks[0], task.begin);
    for (int64_t begin = task.begin; begin < task.end; begin += kBlockKeys) {
      KeyBlock<T>& next = blocks[1 - current];
      const bool last = begin + kBlockKeys >= task.end;
      if (!last) locate(next, begin + kBlockKeys);
      const int64_t end = begin + blocks[current].count;
      const bool any = begin < seen.sinks || (end > seen.begin && begin < seen.end);
      if (any) score(blocks[current], last ? nullptr : &next, rows);
      reduce(blocks[current], any ? rows : 0);
      current = 1 - current;
    }
  }

  void locate(KeyBlock<T>& block, int64_t begin) const {
    const int64_t left = task.end - begin;
    block.locate(p, task.sequence, task.h0, begin, left < kBlockKeys ? left : kBlockKeys);
  }

  void score(const KeyBlock<T>& block, const KeyBlock<T>* next, int64_t rows) {
    const int64_t heads = task.h1 - task.h0, dim = round_up(p.dim, kPair<T>);
    const int64_t row_bytes = p.dim * static_cast<int64_t>(sizeof(T));
    const int64_t fit = 1 + kPrefetchBytes / (heads * row_bytes);
    const int64_t ahead = fit < kBlockKeys ? fit : kBlockKeys;
    const T* keys[2 * kBlockKeys];
    for (int i = 0; i < kBlockKeys; ++i) {
      keys[i] = block.k[i];
      keys[kBlockKeys + i] = next == nullptr ? nullptr : next->k[i];
    }
    for_row_groups<A>(rows, [&](auto rows_at_once, int64_t r) {
      constexpr int R = decltype(rows_at_once)::value;
      constexpr int K = kTileKeys<T, R>;
      for (int64_t j = 0; j < block.count; j += K) {
        for (int64_t h = 0; h < heads; ++h) {
          const int64_t offset = (task.h0 + h) * p.k.head_stride;
          const T* tile[K];
#pragma GCC unroll 16
          for (int i = 0; i < K; ++i) {
            tile[i] = keys[j + i] == nullptr ? s.zeros : keys[j + i] + offset;
            const T* later = keys[j + i + ahead];
            if (later == nullptr) continue;
            const char* line = reinterpret_cast<const char*>(later + offset);
            for (int64_t n = 0; n < row_bytes; n += 64) prefetch_line(line + n);
          }
          score_tile<T, R>(s.q + h * kFewRows * dim + r * q_stride, q_stride, tile, p.dim,
                           s.scores + (h * kFewRows + r) * kBlockKeys + j);
        }
      }
    });
  }

  void reduce(const KeyBlock<T>& block, int64_t rows) {
    const bool has_addend = block.has_addend(p);
    const bool hides = rows > 0 && masked(task.h0, 0, seq.num_q, block.begin, block.count);
    for (int64_t h = task.h0; h < task.h1; ++h) {
      if (has_addend) block.addends(p, h, s.addends);
      memset(s.columns, 0, kBlockKeys * sizeof(A));
      for (int64_t r = 0; r < rows; ++r) {
        add_row(s.scores + ((h - task.h0) * kFewRows + r) * kBlockKeys, block.begin, r / p.group,
                h * p.group + r % p.group, h, has_addend ? s.addends : nullptr, hides, s.columns);
      }
      write(h, block.begin, block.count, s.columns);
    }
  }

  // ---- many rows, of one head ----

  void many() {
    PackedKeys<T>& keys = s.keys;
    keys.pack(task.sequence, task.h0, task.begin, task.end, [](const HeadBlock<T>&, int64_t) {});
    memset(s.columns, 0, round_up(task.end - task.begin, kBlockKeys) * sizeof(A));
    const int64_t step = block_queries(p.group), head = task.h0;
    for (int64_t i0 = 0; i0 < seq.num_q; i0 += step) {
      const int64_t i1 = i0 + step < seq.num_q ? i0 + step : seq.num_q;
      keys.score(i0, i1, [&](const auto& block) {
        for (int64_t r = 0; r < (i1 - i0) * p.group; ++r) {
          add_row(keys.scores + r * kBlockKeys, task.begin + block.at, i0 + r / p.group,
                  head * p.group + r % p.group, head, keys.addends_at(block), block.hides,
                  s.columns + block.at);
        }
      });
    }
    write(head, task.begin, task.end - task.begin, s.columns);
  }
};

template <class T>
constexpr ColstatsKernel kernel_for() {
  return {Colstats<T>::scratch_bytes, Colstats<T>::run};
}

}  // namespace

namespace cpu::MEMKERNELS_ISA {

ColstatsKernel colstats_kernel(Dtype dtype) {
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
