// o_i = sum_j softmax_j(logit_ij) v_j over the visible keys of a sequence, online: per row a
// running maximum m, sum l and accumulator O, rescaled when the maximum grows.
//
// Cost per sequence: num_q * Hq * kv_len * (D + Dv) multiply-adds over kv_len * Hkv * (D + Dv)
// elements of K and V, each read once for all heads of its group. Few rows (decode) are bound by
// that read: dot products straight from the cache, the next block prefetched meanwhile. Many rows
// (prefill) are bound by arithmetic: K and V are packed block by block into panels for matmul().
// Few rows each of many sequences that share their keys are packed too, and computed in the order
// of the dot products, so that sharing changes no bit.
#include "attention/paged_attention_cpu.h"

#include "attention/block_cpu.h"
#include "attention/few_rows_cpu.h"

namespace memkernels::attention {
namespace {

// Up to here dot products beat packing.
constexpr int kFewRows = 12;

// How far ahead of the arithmetic the cache is asked for: enough to hide memory.
constexpr int64_t kPrefetchBytes = 16384;

// A worker's buffers for `rows` rows of `heads` KV heads.
template <class T>
struct Scratch {
  using A = Acc<T>;
  using Unit = typename Math<T>::Unit;
  Unit* q;           // [heads][rows][units of dim]
  A* out;            // [heads][rows][dim_v], in pair order
  A* max;            // [heads][rows]
  A* sum;            // [heads][rows]
  A* scores;         // [rows][kBlockKeys], or [heads][kFewRows][kBlockKeys]
  Unit* weights;     // [rows][units of kBlockKeys]
  Unit* packed;      // a block of K or V
  A* turned;         // [kKeyRows][rows]: scores of a block, keys as rows
  const T** q_rows;  // [rows]
  T* zeros;          // a row
  A* merged;         // [heads][rows][partial_size(dim_v)]
  size_t bytes;

  Scratch(const Problem& p, int64_t rows, int64_t heads, void* base) {
    const Layout<T> pad(p);
    const int64_t widest = pad.dim > pad.dim_v ? pad.dim : pad.dim_v;
    Arena arena{static_cast<char*>(base)};
    q = arena.take<Unit>(heads * rows * pad.dim);
    out = arena.take<A>(heads * rows * pad.dim_v);
    max = arena.take<A>(heads * rows);
    sum = arena.take<A>(heads * rows);
    scores = arena.take<A>((rows > heads * kFewRows ? rows : heads * kFewRows) * kBlockKeys);
    weights = arena.take<Unit>(rows * kBlockKeys);
    packed = arena.take<Unit>(kKeyRows * widest);
    turned = arena.take<A>(kKeyRows * rows);
    q_rows = arena.take<const T*>(rows);
    zeros = arena.take<T>(widest);
    merged = arena.take<A>(heads * rows * partial_size(p.dim_v));
    bytes = arena.used;
  }
};

// Logits of one row to weights e^(logit - max), in place; updates the running maximum and sum and
// returns what the accumulator is to be multiplied by.
template <class A>
MK_INLINE A update_softmax(A* logits, A& running_max, A& running_sum) {
  constexpr int W = kLanes<A>;
  Vec<A> top = load(logits);
  for (int j = W; j < kBlockKeys; j += W) top = vmax(top, load(logits + j));
  const A block_max = max<A>(top);
  const A new_max = block_max > running_max ? block_max : running_max;
  const A base = new_max == -kInfinity<A> ? A(0) : new_max;
  Vec<A> total{};
  for (int j = 0; j < kBlockKeys; j += W) {
    const Vec<A> weight = exp(load(logits + j) - base);
    total += weight;
    store(logits + j, weight);
  }
  const A rescale = new_max == running_max ? A(1) : exp(running_max - base);
  running_sum = running_sum * rescale + sum<A>(total);
  running_max = new_max;
  return rescale;
}

template <class A>
MK_INLINE void scale_row(A* row, int64_t n, A factor) {
  for (int64_t d = 0; d < n; d += kLanes<A>) store(row + d, load(row + d) * factor);
}

// Writes out and lse of one row from its state, after the sink.
template <class T>
void finish_row(const Problem& p, int64_t token, int64_t head, Acc<T> max, Acc<T> sum,
                const Acc<T>* values) {
  using A = Acc<T>;
  T* out = reinterpret_cast<T*>(p.out.data) + token * p.out.token_stride + head * p.out.head_stride;
  A* lse = reinterpret_cast<A*>(p.lse.data) + token * p.lse.token_stride + head * p.lse.head_stride;
  A rescale = 1;
  if (p.sink_logit != nullptr) {
    const A sink = static_cast<A>(p.sink_logit[head]);
    const A top = sink > max ? sink : max;
    if (top > -kInfinity<A>) {
      rescale = exp(max - top);
      sum = sum * rescale + exp(sink - top);
      max = top;
    }
  }
  if (sum == 0) {
    memset(static_cast<void*>(out), 0, p.dim_v * sizeof(T));
    *lse = -kInfinity<A>;
    return;
  }
  *lse = max + log(sum);
  if (rescale == 0) {  // no visible key: whatever lies in `values` is not ours
    memset(static_cast<void*>(out), 0, p.dim_v * sizeof(T));
    return;
  }
  pack_row<T>(values, p.dim_v, rescale / sum, out);
}

// Queries [i0, i1) of each of some sequences. Several only where all of them see the same keys.
struct Queries {
  const int64_t* sequences;
  int64_t num_sequences;
  int64_t i0, i1;
};

// The state of query rows and KV heads [h0, h1) (of one window) after keys [clip_begin, clip_end),
// in scratch. The bits of a row do not depend on the other sequences.
template <class T>
struct Attend {
  using A = Acc<T>;
  using M = Math<T>;
  using Unit = typename M::Unit;
  const Problem& p;
  const Layout<T> pad;
  const Queries queries;
  const int64_t b, i0, h0, h1;
  const Sequence& seq;
  const int64_t sequence_rows;  // queries times group
  const int64_t rows;
  const int64_t padded_rows;  // to kTileRows
  const bool keys_as_rows;  // turning the scores of so few rows costs less than turning their keys
  const Scratch<T> s;
  const int64_t ahead;  // rows to prefetch ahead, at most kBlockKeys
  int64_t q_stride = 0;

  Attend(const Problem& p, const Queries& queries, int64_t h0, int64_t h1, void* scratch)
      : p(p),
        pad(p),
        queries(queries),
        b(queries.sequences[0]),
        i0(queries.i0),
        h0(h0),
        h1(h1),
        seq(p.sequences[b]),
        sequence_rows((queries.i1 - queries.i0) * p.group),
        rows(queries.num_sequences * sequence_rows),
        padded_rows(round_up(rows, kTileRows)),
        keys_as_rows(sequence_rows > kFewRows && rows % kPanel<A> == 0 && 2 * rows <= p.dim),
        s(p, padded_rows, h1 - h0, scratch),
        ahead(rows_ahead((h1 - h0) * p.dim * static_cast<int64_t>(sizeof(T)))) {}

  static int64_t rows_ahead(int64_t row_bytes) {
    const int64_t n = 1 + kPrefetchBytes / row_bytes;
    return n < kBlockKeys / 2 ? n : kBlockKeys / 2;
  }

  int64_t position(int64_t i) const { return seq.kv_len - seq.num_q + i; }
  int64_t query_of(int64_t row) const { return i0 + row % sequence_rows / p.group; }
  int64_t sequence_of(int64_t row) const { return queries.sequences[row / sequence_rows]; }
  int64_t token_of(int64_t row) const {
    return p.sequences[sequence_of(row)].q_begin + query_of(row);
  }

  void prepare() {
    const int64_t heads = h1 - h0;
    const T* q = reinterpret_cast<const T*>(p.q.data);
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t r = 0; r < padded_rows; ++r) {
        s.q_rows[r] = r < rows ? q + token_of(r) * p.q.token_stride +
                                     ((h0 + h) * p.group + r % p.group) * p.q.head_stride
                               : nullptr;
      }
      Unit* packed = s.q + h * padded_rows * pad.dim;
      if (keys_as_rows) {
        pack_b_transposed<T>(s.q_rows, rows, p.dim, packed);
      } else {
        q_stride = pack_a<T>(s.q_rows, padded_rows, p.dim, packed);
      }
    }
    memset(s.out, 0, heads * padded_rows * pad.dim_v * sizeof(A));
    memset(s.sum, 0, heads * padded_rows * sizeof(A));
    memset(s.scores + rows * kBlockKeys, 0, (padded_rows - rows) * kBlockKeys * sizeof(A));
    for (int64_t i = 0; i < heads * padded_rows; ++i) s.max[i] = -kInfinity<A>;
    memset(static_cast<void*>(s.zeros), 0, (pad.dim > pad.dim_v ? pad.dim : pad.dim_v) * sizeof(T));
  }

  void run(int64_t clip_begin, int64_t clip_end) {
    prepare();
    KeyBlock<T> blocks[2];
    KeyBlock<T>* current = nullptr;
    int next = 0;
    // One block behind, so that its successor's rows are known in time to prefetch them.
    const KeyRange seen = visible_keys(p, h0, seq.kv_len, position(i0), position(queries.i1 - 1));
    for_each_block(seen, clip_begin, clip_end, [&](int64_t first, int64_t count) {
      KeyBlock<T>& block = blocks[next];
      next = 1 - next;
      block.locate(p, b, h0, first, count);
      if (current != nullptr) attend_block(*current, &block);
      current = &block;
    });
    if (current != nullptr) attend_block(*current, nullptr);
  }

  void attend_block(const KeyBlock<T>& block, const KeyBlock<T>* following) {
    if (rows <= kFewRows) {
      attend_few(block, following);
      return;
    }
    for (int64_t h = h0; h < h1; ++h) attend_many(block, h);
  }

  bool needs_mask(const KeyBlock<T>& block) const {
    return !all_visible(p, h0, seq.kv_len, position(i0), position(queries.i1 - 1), block.begin,
                        block.count);
  }

  // Scores of row r of the task's head h to weights, in place, and the state after them. Not
  // inlined: one body, one rounding, whoever calls it.
  __attribute__((noinline)) void softmax_row(const KeyBlock<T>& block, const A* addend, bool masked,
                                             int64_t h, int64_t r, A* scores) const {
    KeyRange seen;
    if (masked) {
      const int64_t at = position(query_of(r));
      seen = visible_keys(p, h0, seq.kv_len, at, at);
    }
    to_logits(scores, p, addend, block.begin, masked ? &seen : nullptr);
    const int64_t row = h * padded_rows + r;
    const A rescale = update_softmax(scores, s.max[row], s.sum[row]);
    if (rescale != 1) scale_row(s.out + row * pad.dim_v, pad.dim_v, rescale);
  }

  // The rows of K and V in the order in which they are read (the block's keys, its values, the next
  // block's keys), and how far they have been asked for. Within a token it goes from head to head,
  // which is the order of addresses in an NHD cache whatever the order of the arithmetic: only then
  // does the hardware's own prefetching join in.
  struct Upcoming {
    const char* row[3 * kBlockKeys];
    int64_t head_stride[3 * kBlockKeys];  // bytes
    int64_t line_bytes, h0, h1;
    int64_t place, head;

    // Inlined by force: GCC takes a function that only prefetches to be without effect, and drops
    // calls of it.
    MK_INLINE void prefetch(int count) {
      for (int n = 0; n < count; ++n) {
        const char* at = row[place] + head * head_stride[place];
        for (int64_t line = 0; line < line_bytes; line += 128) {  // lines come in pairs
          prefetch_line(at + line);
          prefetch_line(at + line + 64);
        }
        if (++head == h1) {
          head = h0;
          ++place;
        }
      }
    }
  };

  Upcoming upcoming_rows(const KeyBlock<T>& block, const KeyBlock<T>* following) const {
    Upcoming out;
    int64_t n = 0;
    const auto add = [&](const T* const* rows, int64_t count, const Rows& of) {
      for (int64_t i = 0; i < count; ++i, ++n) {
        const T* row = rows[i] == nullptr ? s.zeros : rows[i];
        out.row[n] = reinterpret_cast<const char*>(row);
        out.head_stride[n] = rows[i] == nullptr ? 0 : of.head_stride * sizeof(T);
      }
    };
    add(block.k, block.count, p.k);
    add(block.v, block.count, p.v);
    if (following != nullptr) add(following->k, following->count, p.k);
    for (; n < 3 * kBlockKeys; ++n) {
      out.row[n] = reinterpret_cast<const char*>(s.zeros);
      out.head_stride[n] = 0;
    }
    out.line_bytes = (p.dim < p.dim_v ? p.dim : p.dim_v) * sizeof(T);
    out.h0 = out.head = h0;
    out.h1 = h1;
    out.place = ahead;
    return out;
  }

  // Token by token through all heads of the task, in the order in which they lie in an NHD cache.
  template <int R>
  void few_rows(const KeyBlock<T>& block, Upcoming upcoming, int64_t r0) {
    constexpr int K = kTileKeys<T, R>;
    const int64_t heads = h1 - h0;
    const int64_t q_size = padded_rows * pad.dim;
    const auto row_of = [&](const T* row, const Rows& of, int64_t h) {
      return row == nullptr ? s.zeros : row + (h0 + h) * of.head_stride;
    };
    for (int64_t j = 0; j < block.count; j += K) {
      for (int64_t h = 0; h < heads; ++h) {
        const T* k[K];
#pragma GCC unroll 16
        for (int i = 0; i < K; ++i) k[i] = row_of(block.k[j + i], p.k, h);
        upcoming.prefetch(K);
        score_tile<T, R>(s.q + h * q_size + r0 * q_stride, q_stride, k, p.dim,
                         s.scores + h * kFewRows * kBlockKeys + j);
      }
    }
    const bool masked = needs_mask(block);
    const bool has_addend = block.has_addend(p);
    A addends[kBlockKeys];
    for (int64_t h = 0; h < heads; ++h) {
      A* scores = s.scores + h * kFewRows * kBlockKeys;
      if (has_addend) block.addends(p, h0 + h, addends);
      for (int r = 0; r < R; ++r) {
        A* row = scores + r * kBlockKeys;
        for (int64_t j = round_up(block.count, K); j < kBlockKeys; ++j) row[j] = 0;
        softmax_row(block, has_addend ? addends : nullptr, masked, h, r0 + r, row);
      }
    }
    const int passes = static_cast<int>(pad.dim_v / (kPassChunks<R> * kPair<T>));
    const int per_pass = passes > 1 ? (kRunKeys + passes - 1) / passes : kRunKeys;
    for (int64_t j = 0; j < block.count; j += kRunKeys) {
      const int run = static_cast<int>(block.count - j < kRunKeys ? block.count - j : kRunKeys);
      for (int64_t h = 0; h < heads; ++h) {
        const T* v[kRunKeys];
        for (int i = 0; i < run; ++i) {
          v[i] = block.hidden(p, j + i, h0 + h) ? s.zeros : row_of(block.v[j + i], p.v, h);
        }
        // Spread over the passes: a burst of prefetches would stall until memory has answered.
        int left = run;
        const auto prefetch_some = [&]() __attribute__((always_inline)) {
          const int count = left < per_pass ? left : per_pass;
          upcoming.prefetch(count);
          left -= count;
        };
        add_values<T, R>(s.scores + h * kFewRows * kBlockKeys + j, v, run, p.dim_v,
                         s.out + (h * padded_rows + r0) * pad.dim_v, pad.dim_v, prefetch_some);
      }
    }
  }

  void attend_few(const KeyBlock<T>& block, const KeyBlock<T>* following) {
    const Upcoming upcoming = upcoming_rows(block, following);
    for_row_groups<A>(
        rows, [&](auto group, int64_t r) { few_rows<decltype(group)::value>(block, upcoming, r); });
  }

  void attend_many(const KeyBlock<T>& block, int64_t head) {
    const int64_t h = head - h0;
    const bool masked = needs_mask(block);
    HeadBlock<T> keys;
    keys.select(p, block, head);
    // Sequences that would be few rows alone get the bits that attend_few() gives them.
    const bool as_few = sequence_rows <= kFewRows;
    const Unit* q = s.q + h * padded_rows * pad.dim;
    const int64_t K = pad.dim / M::kElements;
    if (keys_as_rows) {
      const int64_t stride = pack_a<T>(keys.k, kKeyRows, p.dim, s.packed);
      matmul<M>(kKeyRows, rows, K, s.packed, stride, 1, q, s.turned, rows, false);
      transpose_matrix<A>(s.turned, kBlockKeys, rows, s.scores);
    } else {
      pack_b_transposed<T>(keys.k, kBlockKeys, p.dim, s.packed);
      if (as_few) {
        dot_products<M>(padded_rows, kBlockKeys, K, q, q_stride, s.packed, s.scores, kBlockKeys);
      } else {
        matmul<M>(padded_rows, kBlockKeys, K, q, q_stride, 1, s.packed, s.scores, kBlockKeys,
                  false);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      softmax_row(block, keys.has_addend ? keys.addend : nullptr, masked, h, r,
                  s.scores + r * kBlockKeys);
    }
    A* out = s.out + h * padded_rows * pad.dim_v;
    if (as_few) {
      using Wide = Scalar<A>;
      pack_b<T, Wide>(keys.v, kBlockKeys, p.dim_v, s.packed);
      matmul<Wide>(padded_rows, pad.dim_v, kBlockKeys, s.scores, kBlockKeys, 1, s.packed, out,
                   pad.dim_v, true);
      return;
    }
    pack_b<T>(keys.v, kBlockKeys, p.dim_v, s.packed);
    const auto* weights = as_a<M>(s.scores, padded_rows, kBlockKeys, s.weights);
    matmul<M>(padded_rows, pad.dim_v, units<M>(kBlockKeys), weights, units<M>(kBlockKeys), 1,
              s.packed, out, pad.dim_v, true);
  }

  // max, sum, values.
  void copy_state(int64_t row, A* to) const {
    to[0] = s.max[row];
    to[1] = s.sum[row];
    memcpy(to + 2, s.out + row * pad.dim_v, pad.dim_v * sizeof(A));
  }

  // Calls visit(sequence, query, head, state row) for every row of the task.
  template <class Visit>
  void for_each_row(const Visit& visit) const {
    for (int64_t h = h0; h < h1; ++h) {
      for (int64_t r = 0; r < rows; ++r) {
        visit(sequence_of(r), query_of(r), h * p.group + r % p.group, (h - h0) * padded_rows + r);
      }
    }
  }
};

template <class T>
struct Forward {
  using A = Acc<T>;

  static size_t scratch_bytes(const Problem& p, int64_t max_rows, int64_t max_heads) {
    return Scratch<T>(p, round_up(max_rows, kTileRows), max_heads, nullptr).bytes;
  }

  static void run(const ForwardJob& job, int64_t task, void* scratch) {
    const Problem& p = *job.problem;
    if (task < job.num_shared * p.num_kv_heads) {
      run_shared(job, job.shared[task / p.num_kv_heads], task % p.num_kv_heads, scratch);
      return;
    }
    const int64_t b = sequence_of_task(job.tasks, p.num_sequences, task);
    const SequenceTasks& t = job.tasks[b];
    const Sequence& seq = p.sequences[b];
    const int64_t local = task - t.first_task;
    const int64_t h0 = local % t.head_groups * t.heads_per_task;
    const int64_t h1 =
        h0 + t.heads_per_task < p.num_kv_heads ? h0 + t.heads_per_task : p.num_kv_heads;
    const int64_t part = local / t.head_groups;
    if (!t.one_task) {
      run_split(job, {&b, 1, 0, seq.num_q}, t.shared_splits + part, h0, h1, scratch);
      return;
    }
    const int64_t block = t.num_blocks - 1 - part;  // under a causal mask the last is longest
    const int64_t i0 = block * t.block_queries;
    const int64_t i1 = i0 + t.block_queries < seq.num_q ? i0 + t.block_queries : seq.num_q;
    Attend<T> attend(p, {&b, 1, i0, i1}, h0, h1, scratch);
    const int64_t length = t.num_splits == 1 ? seq.kv_len : t.split_len;
    for (int64_t split = 0; split < t.num_splits; ++split) {
      attend.run(split * length, (split + 1) * length);
      attend.for_each_row([&](int64_t, int64_t, int64_t, int64_t row) {
        A* merged = attend.s.merged + row * partial_size(p.dim_v);
        if (split == 0) {
          attend.copy_state(row, merged);
        } else {
          merge_state(p, merged, attend.s.max[row], attend.s.sum[row],
                      attend.s.out + row * attend.pad.dim_v);
        }
      });
    }
    attend.for_each_row([&](int64_t, int64_t i, int64_t head, int64_t row) {
      const A* merged = attend.s.merged + row * partial_size(p.dim_v);
      finish_row<T>(p, seq.q_begin + i, head, merged[0], merged[1], merged + 2);
    });
  }

  // As many members at a time as a block of rows takes; after the first, K and V come from cache.
  static void run_shared(const ForwardJob& job, const SharedSplit& shared, int64_t head,
                         void* scratch) {
    const Problem& p = *job.problem;
    const int64_t num_q = p.sequences[job.members[shared.begin]].num_q;
    const int64_t fit = kBlockRows / (num_q * p.group);
    const int64_t most = fit > 1 ? fit : 1;
    for (int64_t m = shared.begin; m < shared.end; m += most) {
      const int64_t n = shared.end - m < most ? shared.end - m : most;
      run_split(job, {job.members + m, n, 0, num_q}, shared.split, head, head + 1, scratch);
    }
  }

  // Leaves the partial states of one split.
  static void run_split(const ForwardJob& job, const Queries& queries, int64_t split, int64_t h0,
                        int64_t h1, void* scratch) {
    const int64_t length = job.tasks[queries.sequences[0]].split_len;
    Attend<T> attend(*job.problem, queries, h0, h1, scratch);
    attend.run(split * length, (split + 1) * length);
    attend.for_each_row([&](int64_t b, int64_t i, int64_t head, int64_t row) {
      attend.copy_state(row, partial_at(job, b, split, i, head));
    });
  }

  // Not inlined: one body, one rounding, whoever calls it.
  __attribute__((noinline)) static void merge_state(const Problem& p, A* into, A max, A sum,
                                                    const A* values) {
    if (max == -kInfinity<A> && sum == 0) return;
    const A top = max > into[0] ? max : into[0];
    const A base = top == -kInfinity<A> ? A(0) : top;
    const A keep = exp(into[0] - base), add = exp(max - base);
    into[0] = top;
    into[1] = into[1] * keep + sum * add;
    for (int64_t d = 0; d < Layout<T>(p).dim_v; d += kLanes<A>) {
      store(into + 2 + d, load(into + 2 + d) * keep + load(values + d) * add);
    }
  }

  // Merges the splits of one query in their order, for all heads.
  static void merge(const ForwardJob& job, int64_t b, int64_t i) {
    const Problem& p = *job.problem;
    const SequenceTasks& t = job.tasks[b];
    const Sequence& seq = p.sequences[b];
    for (int64_t head = 0; head < p.num_heads; ++head) {
      A* into = partial_at(job, b, 0, i, head);
      for (int64_t split = 1; split < t.num_splits; ++split) {
        const A* from = partial_at(job, b, split, i, head);
        merge_state(p, into, from[0], from[1], from + 2);
      }
      finish_row<T>(p, seq.q_begin + i, head, into[0], into[1], into + 2);
    }
  }

  static A* partial_at(const ForwardJob& job, int64_t b, int64_t split, int64_t i, int64_t head) {
    const Problem& p = *job.problem;
    const int64_t query = split * p.sequences[b].num_q + i;
    const int64_t index = job.tasks[b].first_partial + query * p.num_heads + head;
    return static_cast<A*>(job.partials) + index * partial_size(p.dim_v);
  }
};

template <class T>
constexpr ForwardKernel kernel_for() {
  return {Forward<T>::scratch_bytes, Forward<T>::run, Forward<T>::merge};
}

}  // namespace

namespace cpu::MEMKERNELS_ISA {

ForwardKernel forward_kernel(Dtype dtype) {
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
}  // namespace memkernels::attention
