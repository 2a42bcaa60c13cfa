// With p = e^(logit - lse) and delta = rowsum(dO o O) - dlse:
//   dV = P^T dO,  dS = P o (dO V^T - delta),  d key_bias = column sums of dS,
//   dS *= 1 - tanh^2 under a softcap,  dQ = scale dS K,  dK = scale dS^T Q.
//
// Cost: five products of (queries x visible keys x head dim). A task keeps the gradients of a block
// of keys in cache while it goes through the queries that see it; K and V are packed once a block.
#include "attention/paged_attention_backward_cpu.h"
#include "attention/block_cpu.h"

namespace memkernels::attention {
namespace {

template <class T>
struct Scratch {
  using A = Acc<T>;
  using Unit = typename Math<T>::Unit;
  Unit *k_cols, *v_cols, *k_rows;         // panels of a key block: K^T, V^T, K
  Unit *q, *dout, *q_rows, *dout_rows;    // of a query block: as A, and as panels
  A *p, *ds;                              // [block_rows][kBlockKeys]
  Unit *p_cols, *ds_cols, *ds_rows;       // the same as operands
  A *dk, *dv;                             // [kKeyRows][dim]
  A* dbias;                               // [kBlockKeys]
  const T **q_pointers, **dout_pointers;  // [block_rows]
  size_t bytes;

  Scratch(const Problem& problem, int64_t rows, void* base) {
    const Layout<T> pad(problem);
    Arena arena{static_cast<char*>(base)};
    k_cols = arena.take<Unit>(kBlockKeys * pad.dim);
    v_cols = arena.take<Unit>(kBlockKeys * pad.dim_v);
    k_rows = arena.take<Unit>(kBlockKeys * pad.dim);
    q = arena.take<Unit>(rows * pad.dim);
    dout = arena.take<Unit>(rows * pad.dim_v);
    q_rows = arena.take<Unit>(rows * pad.dim);
    dout_rows = arena.take<Unit>(rows * pad.dim_v);
    // Tiles of kKeyRows columns read past the last row's kBlockKeys.
    p = arena.take<A>(rows * kBlockKeys + kTileRows);
    ds = arena.take<A>(rows * kBlockKeys + kTileRows);
    p_cols = arena.take<Unit>(rows * kBlockKeys + kTileRows);
    ds_cols = arena.take<Unit>(rows * kBlockKeys + kTileRows);
    ds_rows = arena.take<Unit>(rows * kBlockKeys);
    dk = arena.take<A>(kKeyRows * pad.dim);
    dv = arena.take<A>(kKeyRows * pad.dim_v);
    dbias = arena.take<A>(kBlockKeys);
    q_pointers = arena.take<const T*>(rows);
    dout_pointers = arena.take<const T*>(rows);
    bytes = arena.used;
  }
};

template <class A>
MK_INLINE void add_row(A* into, const A* from, int64_t n) {
  for (int64_t d = 0; d < n; d += kLanes<A>) store(into + d, load(into + d) + load(from + d));
}

template <class T>
MK_INLINE T* row_at(const Rows& rows, int64_t outer, int64_t token, int64_t head) {
  return reinterpret_cast<T*>(rows.data) + outer * rows.outer_stride + token * rows.token_stride +
         head * rows.head_stride;
}

MK_INLINE int64_t offset_of(const Rows& rows, int64_t outer, int64_t token, int64_t head) {
  return outer * rows.outer_stride + token * rows.token_stride + head * rows.head_stride;
}

template <class T>
struct Backward {
  using A = Acc<T>;
  using M = Math<T>;
  static constexpr int W = kLanes<A>;

  const BackwardJob& job;
  const Problem& p;
  const Layout<T> pad;
  Scratch<T> s;

  Backward(const BackwardJob& job, int64_t block_rows, void* scratch)
      : job(job), p(*job.problem), pad(p), s(p, block_rows, scratch) {}

  bool needs_ds() const { return job.dq.data || job.dk.data || job.dkey_bias.data; }

  // One chunk of keys of one head of one sequence.
  void chunk(int64_t b, int64_t head, int64_t chunk) {
    const BackwardTasks& t = job.tasks[b];
    const Sequence& seq = p.sequences[b];
    A* dq = dq_at(job, t, chunk, head, 0);
    if (job.dq.data) memset(dq, 0, t.num_blocks * t.block_rows * pad.dim * sizeof(A));
    const int64_t begin = chunk * t.chunk_len;
    const int64_t end = begin + t.chunk_len < seq.kv_len ? begin + t.chunk_len : seq.kv_len;
    for (int64_t j = begin; j < end; j += kBlockKeys) {
      KeyBlock<T> block;
      block.locate(p, b, head, j, end - j < kBlockKeys ? end - j : kBlockKeys);
      key_block(b, head, block, dq);
    }
  }

  void key_block(int64_t b, int64_t head, const KeyBlock<T>& block, A* dq) {
    const BackwardTasks& t = job.tasks[b];
    const Sequence& seq = p.sequences[b];
    HeadBlock<T> keys;
    keys.select(p, block, head);
    memset(s.dk, 0, kKeyRows * pad.dim * sizeof(A));
    memset(s.dv, 0, kKeyRows * pad.dim_v * sizeof(A));
    memset(s.dbias, 0, kBlockKeys * sizeof(A));
    bool packed = false;
    for (int64_t n = 0; n < t.num_blocks; ++n) {
      const int64_t i0 = n * t.block_queries;
      const int64_t i1 = i0 + t.block_queries < seq.num_q ? i0 + t.block_queries : seq.num_q;
      const int64_t first = seq.kv_len - seq.num_q + i0, last = seq.kv_len - seq.num_q + i1 - 1;
      const KeyRange seen = visible_keys(p, head, seq.kv_len, first, last);
      const int64_t end = block.begin + block.count;
      if (block.begin >= seen.sinks && (end <= seen.begin || block.begin >= seen.end)) continue;
      if (!packed) {
        pack_b_transposed<T>(keys.k, kBlockKeys, p.dim, s.k_cols);
        if (needs_ds()) pack_b_transposed<T>(keys.v, kBlockKeys, p.dim_v, s.v_cols);
        if (job.dq.data) pack_b<T>(keys.k, kBlockKeys, p.dim, s.k_rows);
        packed = true;
      }
      query_block(b, head, block, keys, i0, i1, dq + n * t.block_rows * pad.dim);
    }
    write_keys(b, head, block);
  }

  void query_block(int64_t b, int64_t head, const KeyBlock<T>& block, const HeadBlock<T>& keys,
                   int64_t i0, int64_t i1, A* dq) {
    const Sequence& seq = p.sequences[b];
    const int64_t rows = (i1 - i0) * p.group;
    const int64_t padded_rows = round_up(rows, kTileRows);
    const int64_t position = seq.kv_len - seq.num_q;
    for (int64_t r = 0; r < padded_rows; ++r) {
      const int64_t token = seq.q_begin + i0 + r / p.group;
      const int64_t query_head = head * p.group + r % p.group;
      s.q_pointers[r] = r < rows ? row_at<T>(p.q, 0, token, query_head) : nullptr;
      s.dout_pointers[r] = r < rows ? row_at<T>(job.dout, 0, token, query_head) : nullptr;
    }
    const int64_t q_stride = pack_a<T>(s.q_pointers, padded_rows, p.dim, s.q);
    matmul<M>(padded_rows, kBlockKeys, pad.dim / M::kElements, s.q, q_stride, 1, s.k_cols, s.p,
              kBlockKeys, false);
    if (needs_ds()) {
      const int64_t stride = pack_a<T>(s.dout_pointers, padded_rows, p.dim_v, s.dout);
      matmul<M>(padded_rows, kBlockKeys, pad.dim_v / M::kElements, s.dout, stride, 1, s.v_cols,
                s.ds, kBlockKeys, false);
    }
    const bool masked = !all_visible(p, head, seq.kv_len, position + i0, position + i1 - 1,
                                     block.begin, block.count);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = position + i0 + r / p.group;
      const KeyRange seen = visible_keys(p, head, seq.kv_len, at, at);
      A* scores = s.p + r * kBlockKeys;
      to_logits(scores, p, keys.has_addend ? keys.addend : nullptr, block.begin,
                masked ? &seen : nullptr);
      const int64_t row =
          (seq.q_begin + i0 + r / p.group) * p.num_heads + head * p.group + r % p.group;
      gradients_of_row(
          scores, s.ds + r * kBlockKeys, keys,
          *row_at<A>(p.lse, 0, seq.q_begin + i0 + r / p.group, head * p.group + r % p.group),
          static_cast<const A*>(job.delta)[row]);
    }
    const int64_t padding = (padded_rows - rows) * kBlockKeys * sizeof(A);
    memset(s.p + rows * kBlockKeys, 0, padding);
    memset(s.ds + rows * kBlockKeys, 0, padding);

    const int64_t K = units<M>(padded_rows);
    if (job.dv.data) {
      pack_b<T>(s.dout_pointers, padded_rows, p.dim_v, s.dout_rows);
      const auto* weights = as_a_transposed<M>(s.p, padded_rows, kBlockKeys, s.p_cols);
      matmul<M>(kKeyRows, pad.dim_v, K, weights, 1, kBlockKeys, s.dout_rows, s.dv, pad.dim_v, true);
    }
    if (job.dk.data) {
      pack_b<T>(s.q_pointers, padded_rows, p.dim, s.q_rows);
      const auto* ds = as_a_transposed<M>(s.ds, padded_rows, kBlockKeys, s.ds_cols);
      matmul<M>(kKeyRows, pad.dim, K, ds, 1, kBlockKeys, s.q_rows, s.dk, pad.dim, true);
    }
    if (job.dq.data) {
      const auto* ds = as_a<M>(s.ds, padded_rows, kBlockKeys, s.ds_rows);
      matmul<M>(padded_rows, pad.dim, units<M>(kBlockKeys), ds, units<M>(kBlockKeys), 1, s.k_rows,
                dq, pad.dim, true);
    }
  }

  // Logits to weights and dO.v to dS, in place.
  void gradients_of_row(A* logits, A* ds, const HeadBlock<T>& keys, A lse, A delta) const {
    const A base = lse == -kInfinity<A> ? A(0) : lse;
    const A inverse_cap = p.softcap > 0 ? static_cast<A>(1 / p.softcap) : A(0);
    for (int j = 0; j < kBlockKeys; j += W) {
      const Vec<A> logit = load(logits + j);
      const Vec<A> weight = exp(logit - base);
      store(logits + j, weight);
      if (!needs_ds()) continue;
      const Vec<A> zero{};
      Vec<A> d = weight == zero ? zero : weight * (load(ds + j) - delta);
      if (job.dkey_bias.data) store(s.dbias + j, load(s.dbias + j) + d);
      if (inverse_cap > 0) {
        const Vec<A> capped = keys.has_addend ? logit - load(keys.addend + j) : logit;
        const Vec<A> t = capped * inverse_cap;
        d = weight == zero ? zero : d * (A(1) - t * t);
      }
      store(ds + j, d);
    }
  }

  void write_keys(int64_t b, int64_t head, const KeyBlock<T>& block) {
    const A scale = static_cast<A>(p.scale);
    for_each_key(p, b, head, block.begin, block.count,
                 [&](int64_t i, int64_t outer, int64_t token) {
                   if (outer < 0) return;
                   const A* dk = s.dk + i * pad.dim;
                   const A* dv = s.dv + i * pad.dim_v;
                   if (job.shared_slot != nullptr && job.shared_slot[outer] >= 0) {
                     const int64_t row = shared_row(job.shared_slot[outer], token, head);
                     if (job.dk.data) add_row(shared_dk(row), dk, pad.dim);
                     if (job.dv.data) add_row(shared_dv(row), dv, pad.dim_v);
                     if (job.dkey_bias.data) static_cast<A*>(job.shared_bias)[row] += s.dbias[i];
                   } else {
                     if (job.dk.data)
                       pack_row<T>(dk, p.dim, scale, row_at<T>(job.dk, outer, token, head));
                     if (job.dv.data)
                       pack_row<T>(dv, p.dim_v, A(1), row_at<T>(job.dv, outer, token, head));
                     if (job.dkey_bias.data) {
                       store_scalar(job.dkey_bias.data, job.dkey_bias.dtype,
                                    offset_of(job.dkey_bias, outer, token, head), s.dbias[i]);
                     }
                   }
                 });
  }

  int64_t shared_row(int64_t slot, int64_t token, int64_t head) const {
    return (slot * p.page_size + token) * p.num_kv_heads + head;
  }
  A* shared_dk(int64_t row) const {
    return static_cast<A*>(job.shared_dk) + row * padded_dim(p.dim);
  }
  A* shared_dv(int64_t row) const {
    return static_cast<A*>(job.shared_dv) + row * padded_dim(p.dim_v);
  }

  static A* dq_at(const BackwardJob& job, const BackwardTasks& t, int64_t chunk, int64_t head,
                  int64_t block) {
    const Problem& p = *job.problem;
    const int64_t index =
        ((chunk * p.num_kv_heads + head) * t.num_blocks + block) * t.block_rows * Layout<T>(p).dim;
    return static_cast<A*>(job.dq_chunks) + t.first_dq + index;
  }

  // ---- the four entry points
  // ---------------------------------------------------------------------

  static size_t scratch_bytes(const Problem& p, int64_t block_rows) {
    return Scratch<T>(p, block_rows, nullptr).bytes;
  }

  static void delta(const BackwardJob& job, int64_t token) {
    const Problem& p = *job.problem;
    for (int64_t head = 0; head < p.num_heads; ++head) {
      const T* out = row_at<T>(p.out, 0, token, head);
      const T* dout = row_at<T>(job.dout, 0, token, head);
      Vec<A> total{};
      for (int64_t d = 0; d < p.dim_v; d += kPair<T>) {
        Vec<A> a, b, x, y;
        load_chunk(out, d, p.dim_v, a, b);
        load_chunk(dout, d, p.dim_v, x, y);
        total += a * x + b * y;
      }
      const int64_t row = token * p.num_heads + head;
      const A dlse = job.dlse == nullptr ? A(0) : static_cast<const A*>(job.dlse)[row];
      static_cast<A*>(job.delta)[row] = sum<A>(total) - dlse;
    }
  }

  static void run(const BackwardJob& job, int64_t task, void* scratch) {
    const Problem& p = *job.problem;
    int64_t block_rows = 0;
    for (int64_t b = 0; b < p.num_sequences; ++b) {
      if (job.tasks[b].block_rows > block_rows) block_rows = job.tasks[b].block_rows;
    }
    Backward<T> backward(job, block_rows, scratch);
    if (job.shared_slot != nullptr) {
      for (int64_t b = 0; b < p.num_sequences; ++b) {
        for (int64_t c = 0; c < job.tasks[b].num_chunks; ++c) backward.chunk(b, task, c);
      }
      return;
    }
    const int64_t b = sequence_of_task(job.tasks, p.num_sequences, task);
    const int64_t local = task - job.tasks[b].first_task;
    backward.chunk(b, local % p.num_kv_heads, local / p.num_kv_heads);
  }

  static void finish_query(const BackwardJob& job, int64_t b, int64_t i) {
    const Problem& p = *job.problem;
    const BackwardTasks& t = job.tasks[b];
    const int64_t stride = Layout<T>(p).dim;
    for (int64_t head = 0; head < p.num_heads; ++head) {
      const int64_t row = i % t.block_queries * p.group + head % p.group;
      const int64_t kv_head = head / p.group, block = i / t.block_queries;
      A* total = dq_at(job, t, 0, kv_head, block) + row * stride;
      for (int64_t c = 1; c < t.num_chunks; ++c) {
        add_row(total, dq_at(job, t, c, kv_head, block) + row * stride, stride);
      }
      pack_row<T>(total, p.dim, static_cast<A>(p.scale),
                  row_at<T>(job.dq, 0, p.sequences[b].q_begin + i, head));
    }
  }

  static void finish_shared(const BackwardJob& job, int64_t head) {
    const Problem& p = *job.problem;
    const Backward<T> backward(job, 0, nullptr);
    for (int64_t page = 0; page < job.num_pages; ++page) {
      if (job.shared_slot[page] < 0) continue;
      for (int64_t token = 0; token < p.page_size; ++token) {
        const int64_t row = backward.shared_row(job.shared_slot[page], token, head);
        if (job.dk.data) {
          pack_row<T>(backward.shared_dk(row), p.dim, static_cast<A>(p.scale),
                      row_at<T>(job.dk, page, token, head));
        }
        if (job.dv.data) {
          pack_row<T>(backward.shared_dv(row), p.dim_v, A(1), row_at<T>(job.dv, page, token, head));
        }
        if (job.dkey_bias.data) {
          store_scalar(job.dkey_bias.data, job.dkey_bias.dtype,
                       offset_of(job.dkey_bias, page, token, head),
                       static_cast<const A*>(job.shared_bias)[row]);
        }
      }
    }
  }
};

template <class T>
constexpr BackwardKernel kernel_for() {
  return {Backward<T>::scratch_bytes, Backward<T>::delta, Backward<T>::run,
          Backward<T>::finish_query, Backward<T>::finish_shared};
}

}  // namespace

namespace cpu::MEMKERNELS_ISA {

BackwardKernel backward_kernel(Dtype dtype) {
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
