// Forward: a block of queries times a block of keys, then the sum over heads of what is positive.
// Backward: the scores S once more, and with G = dI where S > 0, else 0:
//   dw[t, h] = sum_s dI[t, s] relu(S[t, h, s])
//   dq[t, h] = w[t, h] sum_s G[t, h, s] k[s]
//   dk[s]    = sum_{t, h} w[t, h] G[t, h, s] q[t, h]
//
// Cost: T * Hi * kv_len * D multiply-adds forward, five times that backward, over kv_len * D
// elements of K: bound by arithmetic.
#include "selection/indexer_scores.h"

#include "selection/packed_keys_cpu.h"

namespace memkernels::selection {
namespace {

using attention::for_each_key;
using attention::kKeyRows;

template <class T>
struct Indexer {
  using A = Acc<T>;
  using M = Math<T>;
  using Unit = typename M::Unit;
  static constexpr int W = kLanes<A>;

  struct Scratch {
    PackedKeys<T> keys;
    A* sums;       // [kBlockKeys]
    Unit* k_rows;  // [keys] of units of dim, as rows of a product
    Unit* q_rows;  // [rows] of units of dim, as rows of a product
    A* g;          // [rows][kBlockKeys], of which the last is read as if it had kKeyRows
    Unit* g_units;
    A* dq;        // [rows][dim]
    A* dw;        // [rows]
    A* dk;        // [keys][dim]
    A* block_dk;  // [kKeyRows][dim]
    size_t bytes;
    Scratch(const Problem& p, Arena arena)
        : keys(p, stretch_keys(p.dim), arena),
          sums(arena.take<A>(kBlockKeys)),
          k_rows(arena.take<Unit>(stretch_keys(p.dim) * keys.dim)),
          q_rows(arena.take<Unit>(keys.most_rows(p) * keys.dim)),
          g(arena.take<A>(keys.most_rows(p) * kBlockKeys + kTileRows)),
          g_units(arena.take<Unit>(keys.most_rows(p) * kBlockKeys + kTileRows)),
          dq(arena.take<A>(keys.most_rows(p) * keys.dim)),
          dw(arena.take<A>(keys.most_rows(p))),
          dk(arena.take<A>(stretch_keys(p.dim) * keys.dim)),
          block_dk(arena.take<A>(kKeyRows * keys.dim)),
          bytes(arena.used) {}
  };

  static size_t scratch_bytes(const Problem& p) { return Scratch(p, Arena{nullptr}).bytes; }

  const IndexerJob& job;
  const Problem& p;
  const IndexerTask& task;
  const Sequence& seq;
  Scratch s;
  const int64_t dim, step;

  Indexer(const IndexerJob& job, const IndexerTask& task, void* scratch)
      : job(job),
        p(*job.problem),
        task(task),
        seq(p.sequences[task.sequence]),
        s(p, Arena{static_cast<char*>(scratch)}),
        dim(s.keys.dim),
        step(block_queries(p.group)) {}

  // Of scores, or of their gradient: query i, key j.
  A* row_at(int64_t i, int64_t j) const {
    const TensorView& t = job.args->scores;
    return static_cast<A*>(t.data) + (seq.q_begin + i) * t.shape[1] + j;
  }

  A weight_of(int64_t i, int64_t head) const {
    const TensorView& w = job.args->w;
    const int64_t at = (seq.q_begin + i) * w.stride[0] + head * w.stride[1];
    return w.dtype == p.dtype ? to_acc(static_cast<const T*>(w.data)[at])
                              : static_cast<const A*>(w.data)[at];
  }

  // Calls visit(i0, i1) for the blocks of queries of the task.
  template <class Visit>
  void for_queries(const Visit& visit) const {
    for (int64_t i0 = task.i0; i0 < task.i1; i0 += step) {
      visit(i0, i0 + step < task.i1 ? i0 + step : task.i1);
    }
  }

  // Replaces what query i does not see of a block of keys.
  template <class Block>
  void hide(const Block& block, int64_t i, A* values, A hidden) const {
    const A* addends = s.keys.addends_at(block);
    const int64_t at = s.keys.position(i), first = s.keys.begin + block.at;
    const KeyRange seen = attention::visible_keys(p, 0, seq.kv_len, at, at);
    for (int64_t j = 0; j < kBlockKeys; ++j) {
      const bool visible = j < block.count && first + j < seen.end;
      const bool absent = addends != nullptr && addends[j] == -kInfinity<A>;
      if (!visible || absent) values[j] = hidden;
    }
  }

  template <class Block>
  bool hides(const Block& block) const {
    return block.hides || block.count < kBlockKeys || s.keys.has_addend;
  }

  // ---- forward ----

  static void forward(const IndexerJob& job, const IndexerTask& task, void* scratch) {
    Indexer(job, task, scratch).forward();
  }

  void forward() {
    PackedKeys<T>& keys = s.keys;
    keys.pack(task.sequence, 0, task.begin, task.end, [](const HeadBlock<T>&, int64_t) {});
    for_queries([&](int64_t i0, int64_t i1) {
      for (int64_t i = i0; i < i1; ++i) {
        A* row = row_at(i, task.begin);
        for (int64_t j = 0; j < task.end - task.begin; ++j) row[j] = -kInfinity<A>;
      }
      keys.score(i0, i1, [&](const auto& block) {
        for (int64_t i = i0; i < i1; ++i) {
          add_heads(keys.scores + (i - i0) * p.group * kBlockKeys, i);
          if (hides(block)) hide(block, i, s.sums, -kInfinity<A>);
          memcpy(row_at(i, task.begin + block.at), s.sums, block.count * sizeof(A));
        }
      });
    });
  }

  void add_heads(const A* scores, int64_t i) {
    Vec<A> sums[kBlockKeys / W] = {};
    for (int64_t h = 0; h < p.group; ++h) {
      const Vec<A> weight = splat(weight_of(i, h));
#pragma GCC unroll 8
      for (int j = 0; j < kBlockKeys / W; ++j) {
        const Vec<A> x = load(scores + h * kBlockKeys + j * W);
        sums[j] += weight * (x < A(0) ? Vec<A>{} : x);  // a NaN stays
      }
    }
    for (int j = 0; j < kBlockKeys / W; ++j) store(s.sums + j * W, sums[j]);
  }

  // ---- backward ----

  // dI of query i and a block of keys into s.sums, 0 where the query sees no key.
  template <class Block>
  void read_gradient(const Block& block, int64_t i) {
    memset(s.sums, 0, kBlockKeys * sizeof(A));
    memcpy(s.sums, row_at(i, s.keys.begin + block.at), block.count * sizeof(A));
    if (hides(block)) hide(block, i, s.sums, A(0));
  }

  // weight * dI where the scores are positive, and zeros for rows of no query, into s.g.
  template <class Block, class Weight>
  void write_g(const Block& block, int64_t i0, int64_t i1, const Weight& weight) {
    for (int64_t i = i0; i < i1; ++i) {
      read_gradient(block, i);
      for (int64_t h = 0; h < p.group; ++h) {
        const int64_t r = (i - i0) * p.group + h;
        const Vec<A> factor = splat(weight(i, h));
        for (int j = 0; j < kBlockKeys; j += W) {
          const Vec<A> x = load(s.keys.scores + r * kBlockKeys + j);
          store(s.g + r * kBlockKeys + j, x <= A(0) ? Vec<A>{} : factor * load(s.sums + j));
        }
      }
    }
    const int64_t rows = (i1 - i0) * p.group, padded = round_up(rows, kTileRows);
    memset(s.g + rows * kBlockKeys, 0, ((padded - rows) * kBlockKeys + kTileRows) * sizeof(A));
  }

  static void queries(const IndexerJob& job, const IndexerTask& task, void* scratch) {
    Indexer(job, task, scratch).queries();
  }

  // One block of queries, all keys a stretch at a time.
  void queries() {
    const int64_t rows = (task.i1 - task.i0) * p.group, padded = round_up(rows, kTileRows);
    memset(s.dq, 0, padded * dim * sizeof(A));
    memset(s.dw, 0, rows * sizeof(A));
    const int64_t stretch = stretch_keys(p.dim);
    for (int64_t begin = 0; begin < task.end; begin += stretch) {
      const int64_t end = begin + stretch < task.end ? begin + stretch : task.end;
      s.keys.pack(task.sequence, 0, begin, end, [&](const HeadBlock<T>& keys, int64_t at) {
        pack_b<T>(keys.k, kBlockKeys, p.dim, s.k_rows + at * (dim / M::kElements));
      });
      s.keys.score(task.i0, task.i1, [&](const auto& block) {
        write_g(block, task.i0, task.i1, [](int64_t, int64_t) { return A(1); });
        for (int64_t r = 0; r < rows; ++r) {
          Vec<A> sums{};
          for (int j = 0; j < kBlockKeys; j += W) {
            const Vec<A> g = load(s.g + r * kBlockKeys + j);
            sums += g == A(0) ? Vec<A>{} : g * load(s.keys.scores + r * kBlockKeys + j);
          }
          s.dw[r] += sum<A>(sums);
        }
        const auto* g = as_a<M>(s.g, padded, kBlockKeys, s.g_units);
        matmul<M>(padded, dim, units<M>(kBlockKeys), g, units<M>(kBlockKeys), 1,
                  s.k_rows + block.at * (dim / M::kElements), s.dq, dim, true);
      });
    }
    const IndexerGrads& grads = *job.grads;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = task.i0 + r / p.group, h = r % p.group;
      const int64_t row = (seq.q_begin + i) * p.num_heads + h;
      if (grads.dq.data != nullptr) {
        pack_row<T>(s.dq + r * dim, p.dim, weight_of(i, h),
                    static_cast<T*>(grads.dq.data) + row * p.dim);
      }
      if (grads.dw.data == nullptr) continue;
      if (grads.dw.dtype == p.dtype) {
        static_cast<T*>(grads.dw.data)[row] = from_acc<T>(s.dw[r]);
      } else {
        static_cast<A*>(grads.dw.data)[row] = s.dw[r];
      }
    }
  }

  static void keys(const IndexerJob& job, const IndexerTask& task, void* scratch) {
    Indexer(job, task, scratch).keys();
  }

  // One stretch of keys, all queries a block at a time.
  void keys() {
    const int64_t count = task.end - task.begin;
    s.keys.pack(task.sequence, 0, task.begin, task.end, [](const HeadBlock<T>&, int64_t) {});
    memset(s.dk, 0, round_up(count, kBlockKeys) * dim * sizeof(A));
    for_queries([&](int64_t i0, int64_t i1) {
      const int64_t padded = round_up((i1 - i0) * p.group, kTileRows);
      bool packed = false;
      s.keys.score(i0, i1, [&](const auto& block) {
        if (!packed) pack_b<T>(s.keys.q_rows, padded, p.dim, s.q_rows);
        packed = true;
        write_g(block, i0, i1, [&](int64_t i, int64_t h) { return weight_of(i, h); });
        const auto* g = as_a_transposed<M>(s.g, padded, kBlockKeys, s.g_units);
        matmul<M>(kKeyRows, dim, units<M>(padded), g, 1, kBlockKeys, s.q_rows, s.block_dk, dim,
                  false);
        add(s.block_dk, kBlockKeys * dim, s.dk + block.at * dim);
      });
    });
    for_each_key(
        p, task.sequence, 0, task.begin, count, [&](int64_t i, int64_t outer, int64_t token) {
          if (outer < 0) return;
          add(s.dk + i * dim, dim, static_cast<A*>(job.dk) + (outer * p.page_size + token) * dim);
        });
  }

  static void add(const A* from, int64_t n, A* to) {
    for (int64_t i = 0; i < n; i += W) store(to + i, load(to + i) + load(from + i));
  }

  static void finish_keys(const IndexerJob& job, int64_t outer) {
    const Problem& p = *job.problem;
    const int64_t dim = round_up(p.dim, kPair<T>);
    for (int64_t t = outer * p.page_size; t < (outer + 1) * p.page_size; ++t) {
      pack_row<T>(static_cast<const A*>(job.dk) + t * dim, p.dim, A(1),
                  static_cast<T*>(job.grads->dk.data) + t * p.dim);
    }
  }
};

template <class T>
constexpr IndexerKernel kernel_for() {
  return {Indexer<T>::scratch_bytes, Indexer<T>::forward, Indexer<T>::queries, Indexer<T>::keys,
          Indexer<T>::finish_keys};
}

}  // namespace

namespace cpu::MEMKERNELS_ISA {

IndexerKernel indexer_kernel(Dtype dtype) {
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
