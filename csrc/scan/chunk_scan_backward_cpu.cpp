// The gradients of a sequence and head: a forward sweep that keeps S at the beginning of each chunk
// and what its tokens wrote, U; then the chunks from the last to the first, each computed again.
// With dS the gradient of the state after the chunk, and names as in chunk_cpu.h:
//   dU = scores^T dO + write dS,  dR = (I - solve)^-T dU (delta rule; else dU),  dV = beta dR
//   dscores = dO U^T,  dsolve = dR U^T,  dread = dO S^T,  derase = dR S^T,  dwrite = U dS^T
//   dS = total dS + read^T dO + erase^T dR
// dq, dk, dbeta follow from these. The gradient of the log decay g_l is the sum of x dx over every
// product x that d_l is a factor of: reads from token l on, writes before it, the state itself, and
// pairs on both sides of it. No division, so that d = 0 is nothing special. Only with a decay of
// each channel do terms cancel: there the pairs across l are those of later tokens, less those
// that have both tokens behind it.
//
// Cost: 6 K V + 2 C (K + V) multiply-adds a token and head, the delta rule 3 K V + 2 C (K + V)
// more; memory for one head at a time, T V + (T / C) K V numbers a worker.
#include "scan/chunk_cpu.h"

namespace memkernels::scan {
namespace {

// Panels side by side to [rows][ld].
template <class A>
void from_panels(Panels<A> from, int64_t rows, int64_t cols, A* to, int64_t ld) {
  constexpr int W = kLanes<A>, P = kPanel<A>;
  for (int64_t c = 0; c < cols; c += P) {
    for (int64_t r = 0; r < rows; ++r) {
      store(to + r * ld + c, load(from[c / P] + r * P));
      store(to + r * ld + c + W, load(from[c / P] + r * P + W));
    }
  }
}

template <class T>
struct Backward {
  using A = Acc<T>;
  static constexpr int W = kLanes<A>, P = kPanel<A>;

  const ChunkScanArgs& args;
  const ChunkScanGrads& grads;
  Arena arena;
  Chunk<T> chunk;
  int64_t K, V, ld, v_ld, k_panels, v_panels;

  A* states;         // [chunks] states at their beginnings, and
  A* zs;             // [chunks][ld]
  A* us;             // [chunks][v_panels][kChunk][P] what they wrote
  A* right;          // [max(kChunk, k_rows)][P] a right operand
  Panels<A> dstate;  // of the state after the chunk
  A* dz;             // [ld]

  A *dout, *du, *u;                  // [kChunk][v_ld]
  Panels<A> dout_panels, du_panels;  // [v_panels][kChunk][P]
  Panels<A> u_transposed;            // [kChunk / P][v_ld][P]
  Panels<A> state_transposed;        // [k_panels][v_ld][P]
  A *dscores, *dsolve;               // [kChunk][kChunk]
  A* dpairs;                         // [kChunk][kChunk] products of pairs times their gradients
  A* inverse;                        // [kChunk] of the normaliser
  A* dbeta;                          // [kChunk]
  A* diagonal;                       // [kChunk] of dscores
  A* dtotal;                         // [ld] total times its gradient
  A *dread, *derase, *dwrite;        // [kChunk][ld]
  // [kChunk][ld], of pairs; of k as the later and as the earlier token:
  A *dq, *dk_reader, *dk_written;
  A* dgate;                                       // [kChunk][ld]
  Panels<A> q_panels, earlier_keys, later_grads;  // [k_panels][kChunk][P]

  Backward(const ChunkScanArgs& args, const ChunkScanGrads& grads, const ChunkTask& task,
           int64_t tokens, void* base)
      : args(args),
        grads(grads),
        arena{static_cast<char*>(base)},
        chunk(args, task, arena),
        K(chunk.K),
        V(chunk.V),
        ld(chunk.ld),
        v_ld(round_up(V, P)),
        k_panels(ld / P),
        v_panels(v_ld / P) {
    const int64_t chunks = (tokens + kChunk - 1) / kChunk;
    states = arena.take<A>(chunks * v_panels * chunk.k_rows * P);
    zs = arena.take<A>(args.normalize ? chunks * ld : 0);
    us = arena.take<A>(chunks * kChunk * v_ld);
    right = arena.take<A>((kChunk > chunk.k_rows ? kChunk : chunk.k_rows) * P);
    dstate = panels(v_panels, chunk.k_rows);
    dz = arena.take<A>(ld);
    A** const of_values[] = {&dout, &du, &u};
    for (A** x : of_values) *x = arena.take<A>(kChunk * v_ld);
    dout_panels = panels(v_panels, kChunk);
    du_panels = panels(v_panels, kChunk);
    u_transposed = panels(kChunk / P, v_ld);
    state_transposed = panels(k_panels, v_ld);
    A** const of_pairs[] = {&dscores, &dsolve, &dpairs};
    for (A** x : of_pairs) *x = arena.take<A>(kChunk * kChunk);
    A** const of_tokens[] = {&inverse, &dbeta, &diagonal};
    for (A** x : of_tokens) *x = arena.take<A>(kChunk);
    dtotal = arena.take<A>(ld);
    A** const of_channels[] = {&dread, &derase, &dwrite, &dq, &dk_reader, &dk_written, &dgate};
    for (A** x : of_channels) *x = arena.take<A>(kChunk * ld);
    q_panels = panels(k_panels, kChunk);
    earlier_keys = panels(k_panels, kChunk);
    later_grads = panels(k_panels, kChunk);
  }

  Panels<A> panels(int64_t count, int64_t rows) {
    return {arena.take<A>(count * rows * P), rows * P};
  }

  Panels<A> state_of(int64_t i) const {
    return {states + i * v_panels * chunk.k_rows * P, chunk.k_rows * P};
  }
  Panels<A> u_of(int64_t i) const { return {us + i * kChunk * v_ld, kChunk * P}; }

  void run() {
    const ChunkTask& task = chunk.task;
    const int64_t begin = task.tokens.begin, tokens = task.tokens.end - begin;
    const int64_t chunks = (tokens + kChunk - 1) / kChunk;
    sweep(chunks);
    load_state(grads.dstate, task.sequence, task.head, 0, v_panels, dstate, chunk.k_rows);
    load_z(grads.dz, task.sequence, task.head, ld, dz);
    for (int64_t i = chunks - 1; i >= 0; --i) {
      // The sweep has left the last chunk prepared.
      if (i + 1 < chunks) chunk.prepare(begin + i * kChunk);
      through_values(i);
      through_state(i);
      through_pairs();
      if (grads.dg.data != nullptr) chunk.channels ? channel_gates() : scalar_gates();
      write_queries_and_keys();
    }
    if (grads.dinitial_state.data != nullptr) {
      store_state(grads.dinitial_state, task.sequence, task.head, 0, v_panels, dstate);
    }
    if (grads.dinitial_z.data != nullptr) {
      memcpy(static_cast<A*>(grads.dinitial_z.data) +
                 (task.sequence * args.v.shape[2] + task.head) * K,
             dz, K * sizeof(A));
    }
  }

  void sweep(int64_t chunks) {
    const ChunkTask& task = chunk.task;
    if (chunks == 0) return;
    load_state(args.initial_state, task.sequence, task.head, 0, v_panels, state_of(0),
               chunk.k_rows);
    if (args.normalize) load_z(args.initial_z, task.sequence, task.head, ld, zs);
    for (int64_t i = 0; i < chunks; ++i) {
      chunk.prepare(task.tokens.begin + i * kChunk);
      const Panels<A> state = state_of(i), u = u_of(i);
      for (int64_t p = 0; p < v_panels; ++p) {
        chunk.values(p, chunk.right(state[p], chunk.k_rows, right), u[p]);
      }
      if (i + 1 == chunks) break;
      const Panels<A> next = state_of(i + 1);
      memcpy(next.data, state.data, v_panels * state.stride * sizeof(A));
      for (int64_t p = 0; p < v_panels; ++p) {
        chunk.advance(chunk.right(u[p], chunk.rows, right), next[p]);
      }
      if (!args.normalize) continue;
      memcpy(zs + (i + 1) * ld, zs + i * ld, ld * sizeof(A));
      chunk.advance_z(zs + (i + 1) * ld);
    }
  }

  // Where a gradient [B, T, HV, dim] has this head's row of token i.
  template <class X>
  X* row_of(const TensorView& x, int64_t i, int64_t dim) const {
    const int64_t token = chunk.task.tokens.batch * args.v.shape[1] + chunk.begin + i;
    return static_cast<X*>(x.data) + (token * args.v.shape[2] + chunk.task.head) * dim;
  }

  void read_dout(int64_t i) {
    for (int64_t t = 0; t < kChunk; ++t) {
      A* row = dout + t * v_ld;
      const bool inside = t < chunk.count;
      read_row(inside ? row_of<const T>(grads.dout, t, V) : nullptr, inside ? V : 0, row, v_ld);
      if (!args.normalize) continue;
      inverse[t] = 0;
      if (!inside) continue;
      inverse[t] = 1 / (chunk.normalizer(t, zs + i * ld) + static_cast<A>(args.eps));
      for (int64_t c = 0; c < v_ld; c += W) store(row + c, load(row + c) * inverse[t]);
    }
    to_panels(dout, v_ld, chunk.rows, v_ld, dout_panels);
  }

  // dU, dV, and their part of dbeta.
  void through_values(int64_t i) {
    read_dout(i);
    const int64_t rows = chunk.rows;
    for (int64_t p = 0; p < v_panels; ++p) {
      A* panel = du_panels[p];
      multiply_panel<Part::upper>(rows, chunk.count, Left<A>{chunk.scores, 1, kChunk},
                                  dout_panels[p], panel, P, Fresh{});
      multiply_panel(rows, K, Left<A>{chunk.write, ld, 1}, dstate[p], panel, P, Added{});
      if (chunk.delta) solve_panel_transposed(rows, chunk.solve, kChunk, panel);
    }
    from_panels(du_panels, rows, v_ld, du, v_ld);
    from_panels(u_of(i), rows, v_ld, u, v_ld);
    for (int64_t t = 0; t < chunk.count; ++t) {
      const A* row = du + t * v_ld;
      if (grads.dv.data != nullptr) {
        T* to = row_of<T>(grads.dv, t, V);
        const A factor = chunk.delta ? chunk.beta[t] : A(1);
        for_columns<A>(V, [&](int64_t c, auto vector, int) __attribute__((always_inline)) {
          vector.store(to + c, vector.load(row + c) * factor);
        });
      }
      if (!chunk.delta) continue;
      const T* v = at<T>(args.v, chunk.task.tokens.batch, chunk.begin + t, chunk.task.head);
      sum_columns<A, 1>(V, dbeta + t,
                        [&](int64_t c, auto vector, Vec<A>* s) __attribute__((always_inline)) {
                          s[0] += vector.load(row + c) * vector.load(v + c);
                        });
    }
  }

  // The gradients of scores, of what reads, erases and writes the state, and of the state before.
  void through_state(int64_t i) {
    const int64_t rows = chunk.rows;
    const Panels<A> state = state_of(i);
    for (int64_t t = rows; t < kChunk; ++t) read_row<A>(nullptr, 0, u + t * v_ld, v_ld);
    to_panels_transposed(u, v_ld, kChunk, V, u_transposed);
    for (int64_t p = 0; p < kChunk / P; ++p) {
      const int64_t first = p * P / kTileRows * kTileRows;
      if (first >= rows) break;
      multiply_panel(rows - first, V, Left<A>{dout + first * v_ld, v_ld, 1}, u_transposed[p],
                     dscores + first * kChunk + p * P, kChunk, Fresh{});
      if (!chunk.delta) continue;
      multiply_panel(rows - first, V, Left<A>{du + first * v_ld, v_ld, 1}, u_transposed[p],
                     dsolve + first * kChunk + p * P, kChunk, Fresh{});
    }

    transpose_state(state);
    for (int64_t p = 0; p < k_panels; ++p) {
      multiply_panel(rows, V, Left<A>{dout, v_ld, 1}, state_transposed[p], dread + p * P, ld,
                     Fresh{});
      if (!chunk.delta) continue;
      multiply_panel(rows, V, Left<A>{du, v_ld, 1}, state_transposed[p], derase + p * P, ld,
                     Fresh{});
    }
    if (grads.dg.data != nullptr) through_total(i, state);
    transpose_state(dstate);
    for (int64_t p = 0; p < k_panels; ++p) {
      multiply_panel(rows, V, Left<A>{u, v_ld, 1}, state_transposed[p], dwrite + p * P, ld,
                     Fresh{});
    }
    if (args.normalize) through_normalizers(zs + i * ld);

    for (int64_t p = 0; p < v_panels; ++p) {
      multiply_panel(K, chunk.count, Left<A>{chunk.read, 1, ld}, dout_panels[p], dstate[p], P,
                     Decayed<A>{chunk.total});
      if (!chunk.delta) continue;
      multiply_panel(K, chunk.count, Left<A>{chunk.erase, 1, ld}, du_panels[p], dstate[p], P,
                     Added{});
    }
  }

  void transpose_state(Panels<A> state) {
    for (int64_t p = 0; p < v_panels; ++p) {
      to_panels_transposed(state[p], P, K, P,
                           Panels<A>{state_transposed.data + p * P * P, state_transposed.stride});
    }
  }

  void through_total(int64_t i, Panels<A> state) {
    for (int64_t c = 0; c < K; ++c) {
      Vec<A> product{};
      for (int64_t p = 0; p < v_panels; ++p) {
        const A *x = state[p] + c * P, *dx = dstate[p] + c * P;
        product += load(x) * load(dx) + load(x + W) * load(dx + W);
      }
      dtotal[c] = sum<A>(product);
      if (args.normalize) dtotal[c] += zs[i * ld + c] * dz[c];
      dtotal[c] *= chunk.total[c];
    }
    for (int64_t c = K; c < ld; ++c) dtotal[c] = 0;
  }

  void through_normalizers(const A* z) {
    A dnormalizer[kChunk];
    for (int64_t t = 0; t < chunk.count; ++t) {
      // What out was before it was divided, times its gradient.
      const A product = dot(chunk.read + t * ld, dread + t * ld, K) +
                        dot(chunk.scores + t * kChunk, dscores + t * kChunk, t + 1);
      dnormalizer[t] = -product * inverse[t];
      for (int64_t j = 0; j <= t; ++j) dscores[t * kChunk + j] += dnormalizer[t];
    }
    for (int64_t c = 0; c < ld; c += W) {
      const Vec<A> before = load(z + c), after = load(dz + c);
      Vec<A> sum = after * load(chunk.total + c);
      for (int64_t t = 0; t < chunk.count; ++t) {
        A *read = dread + t * ld + c, *write = dwrite + t * ld + c;
        store(read, load(read) + before * dnormalizer[t]);
        store(write, load(write) + after);
        sum += load(chunk.read + t * ld + c) * dnormalizer[t];
      }
      store(dz + c, sum);
    }
  }

  // dq and both dk of pairs of different tokens, which dg needs by themselves.
  void through_pairs() {
    const A scale = static_cast<A>(args.scale);
    for (int64_t i = 0; i < chunk.rows; ++i) {
      A erased = 0;
      diagonal[i] = dscores[i * kChunk + i] * scale;
      for (int64_t j = 0; j < kChunk; ++j) {
        const int64_t at = i * kChunk + j;
        if (j >= i) {
          dscores[at] = dsolve[at] = dpairs[at] = A(0);
          continue;
        }
        const A m = chunk.channels ? A(1) : chunk.mask[at];
        dpairs[at] = dscores[at] * chunk.scores[at];
        dscores[at] *= scale * m;
        if (!chunk.delta) continue;
        dpairs[at] += dsolve[at] * chunk.solve[at];
        erased += dsolve[at] * chunk.keys[at];
        dsolve[at] *= -chunk.beta[i] * m;
      }
      if (chunk.delta) dbeta[i] -= erased;
    }
    if (chunk.channels) {
      channel_pairs();
    } else {
      scalar_pairs();
    }
  }

  void scalar_pairs() {
    const int64_t rows = chunk.rows;
    to_panels(chunk.k, ld, rows, ld, earlier_keys);
    to_panels(chunk.q, ld, rows, ld, q_panels);
    for (int64_t p = 0; p < k_panels; ++p) {
      multiply_panel<Part::lower>(rows, rows, Left<A>{dscores, kChunk, 1}, earlier_keys[p],
                                  dq + p * P, ld, Fresh{});
      multiply_panel<Part::upper>(rows, rows, Left<A>{dscores, 1, kChunk}, q_panels[p],
                                  dk_written + p * P, ld, Fresh{});
      if (!chunk.delta) continue;
      multiply_panel<Part::lower>(rows, rows, Left<A>{dsolve, kChunk, 1}, earlier_keys[p],
                                  dk_reader + p * P, ld, Fresh{});
      multiply_panel<Part::upper>(rows, rows, Left<A>{dsolve, 1, kChunk}, earlier_keys[p],
                                  dk_written + p * P, ld, Added{});
    }
  }

  // Between blocks: what readers get from keys that have decayed to the start of their block, then
  // what keys get from readers, from the last block to the first.
  void channel_pairs() {
    const int64_t rows = chunk.rows;
    for (int64_t begin = 0; begin < rows; begin += kBlock) {
      const int64_t end = begin + kBlock < rows ? begin + kBlock : rows;
      for (int64_t p = 0; p < k_panels; ++p) {
        const int64_t at = begin * ld + p * P;
        multiply_panel(end - begin, begin, Left<A>{dscores + begin * kChunk, kChunk, 1},
                       earlier_keys[p], dq + at, ld, Fresh{});
        if (chunk.delta) {
          multiply_panel(end - begin, begin, Left<A>{dsolve + begin * kChunk, kChunk, 1},
                         earlier_keys[p], dk_reader + at, ld, Fresh{});
        }
      }
      for (int64_t c = 0; c < ld; c += W) {
        Vec<A> product = splat(A(1));
        for (int64_t i = begin; i < end; ++i) {
          const int64_t at = i * ld + c;
          product *= load(chunk.decay + at);
          store(dq + at, load(dq + at) * product);
          if (chunk.delta) store(dk_reader + at, load(dk_reader + at) * product);
        }
        A* keys = earlier_keys[c / P] + c % P;
        for (int64_t j = 0; j < begin; ++j) store(keys + j * P, load(keys + j * P) * product);
        product = splat(A(1));
        for (int64_t j = end - 1; j >= begin; --j) {
          store(keys + j * P, load(chunk.k + j * ld + c) * product);
          product *= load(chunk.decay + j * ld + c);
        }
      }
    }

    to_panels(chunk.q_block, ld, rows, ld, q_panels);
    if (chunk.delta) to_panels(chunk.k_block, ld, rows, ld, earlier_keys);
    for (int64_t p = 0; p < k_panels; ++p) {
      memset(later_grads[p], 0, kChunk * P * sizeof(A));
    }
    for (int64_t begin = (rows - 1) / kBlock * kBlock; begin >= 0; begin -= kBlock) {
      const int64_t end = begin + kBlock < rows ? begin + kBlock : rows;
      for (int64_t c = 0; c < ld; c += W) {
        A* later = later_grads[c / P] + c % P;
        Vec<A> product = splat(A(1));
        for (int64_t j = end - 1; j >= begin; --j) {
          store(dk_written + j * ld + c, load(later + j * P) * product);
          product *= load(chunk.decay + j * ld + c);
        }
        for (int64_t j = 0; j < begin; ++j) store(later + j * P, load(later + j * P) * product);
      }
      for (int64_t p = 0; p < k_panels; ++p) {
        multiply_panel(begin, end - begin, Left<A>{dscores + begin * kChunk, 1, kChunk},
                       q_panels[p] + begin * P, later_grads[p], P, Added{});
        if (!chunk.delta) continue;
        multiply_panel(begin, end - begin, Left<A>{dsolve + begin * kChunk, 1, kChunk},
                       earlier_keys[p] + begin * P, later_grads[p], P, Added{});
      }
      block_pairs(begin, end);
    }
  }

  // Pairs inside the block of tokens [begin, end).
  void block_pairs(int64_t begin, int64_t end) {
    for (int64_t c = 0; c < ld; c += W) {
      for (int64_t j = begin; j < end; ++j) {
        Vec<A> key = load(chunk.k + j * ld + c), decayed = splat(A(1)), gradient{};
        for (int64_t i = j + 1; i < end; ++i) {
          const int64_t at = i * ld + c, pair = i * kChunk + j;
          const Vec<A> decay = load(chunk.decay + at);
          key *= decay;
          decayed *= decay;
          store(dq + at, load(dq + at) + key * dscores[pair]);
          Vec<A> reader = load(chunk.q + at) * dscores[pair];
          if (chunk.delta) {
            store(dk_reader + at, load(dk_reader + at) + key * dsolve[pair]);
            reader += load(chunk.k + at) * dsolve[pair];
          }
          gradient += decayed * reader;
        }
        store(dk_written + j * ld + c, load(dk_written + j * ld + c) + gradient);
      }
    }
  }

  void scalar_gates() {
    A later = 0, earlier;
    A pairs[kChunk] = {};  // of each token as the earlier one, with those from token i on
    for (int64_t i = chunk.count - 1; i >= 0; --i) {
      A across = 0;
      for (int64_t j = 0; j < kChunk; ++j) pairs[j] += dpairs[i * kChunk + j];
      for (int64_t j = 0; j < i; ++j) across += pairs[j];
      later += dot(chunk.read + i * ld, dread + i * ld, K);
      if (chunk.delta) later += dot(chunk.erase + i * ld, derase + i * ld, K);
      *row_of<A>(grads.dg, i, 1) = later + across;
    }
    sum_columns<A, 1>(K, &earlier,
                      [&](int64_t c, auto vector, Vec<A>* s)
                          __attribute__((always_inline)) { s[0] += vector.load(dtotal + c); });
    for (int64_t i = 0; i < chunk.count; ++i) {
      *row_of<A>(grads.dg, i, 1) += earlier;
      earlier += dot(chunk.write + i * ld, dwrite + i * ld, K);
    }
  }

  void channel_gates() {
    for (int64_t c = 0; c < ld; c += W) {
      Vec<A> later{};
      for (int64_t i = chunk.count - 1; i >= 0; --i) {
        const int64_t at = i * ld + c;
        later += load(chunk.q + at) * load(dq + at) + load(chunk.read + at) * load(dread + at) -
                 load(chunk.k + at) * load(dk_written + at);
        if (chunk.delta) {
          later += load(chunk.k + at) * load(dk_reader + at) +
                   load(chunk.erase + at) * load(derase + at);
        }
        // Of pairs on both sides nothing is left where d is 0, roundings included.
        later = load(chunk.decay + at) == 0 ? Vec<A>{} : later;
        store(dgate + at, later);
      }
      Vec<A> earlier = load(dtotal + c);
      for (int64_t i = 0; i < chunk.count; ++i) {
        const int64_t at = i * ld + c;
        store(dgate + at, load(dgate + at) + earlier);
        earlier += load(chunk.write + at) * load(dwrite + at);
      }
    }
    for (int64_t i = 0; i < chunk.count; ++i) {
      A* to = row_of<A>(grads.dg, i, K);
      const A* row = dgate + i * ld;
      for_columns<A>(K, [&](int64_t c, auto vector, int) __attribute__((always_inline)) {
        vector.store(to + c, load(row + c));
      });
    }
  }

  void write_queries_and_keys() {
    const A scale = static_cast<A>(args.scale);
    for (int64_t i = 0; i < chunk.count; ++i) {
      const int64_t row = i * ld;
      for (int64_t c = 0; c < ld; c += W) {
        const int64_t at = row + c;
        const Vec<A> before = load(chunk.before + at);
        store(dq + at,
              load(dq + at) + load(chunk.k + at) * diagonal[i] + before * load(dread + at) * scale);
        Vec<A> dk = load(dk_written + at) + load(chunk.q + at) * diagonal[i] +
                    load(chunk.after + at) * load(dwrite + at);
        if (chunk.delta) {
          const Vec<A> erased = before * load(derase + at);
          dk += load(dk_reader + at) - erased * chunk.beta[i];
          store(derase + at, erased);
        }
        store(dk_written + at, dk);
      }
      if (grads.dbeta.data != nullptr) {
        *row_of<A>(grads.dbeta, i, 1) = dbeta[i] - dot(derase + row, chunk.k + row, K);
      }
      write_normalized(grads.dq, i, chunk.q + row, chunk.q_norm[i], dq + row);
      write_normalized(grads.dk, i, chunk.k + row, chunk.k_norm[i], dk_written + row);
    }
  }

  // The gradient of a row of q or k, from that of what was made of it.
  void write_normalized(const TensorView& to, int64_t i, const A* x, A norm, const A* dx) {
    if (to.data == nullptr) return;
    const A along = args.qk_l2norm ? dot(x, dx, K) : A(0);
    const A factor = args.qk_l2norm ? norm : A(1);
    const auto write = [&](auto* row) {
      for_columns<A>(K, [&](int64_t c, auto vector, int) __attribute__((always_inline)) {
        vector.store(row + c, (load(dx + c) - load(x + c) * along) * factor);
      });
    };
    if (to.dtype == args.q.dtype) {
      write(row_of<T>(to, i, K));
    } else {
      write(row_of<A>(to, i, K));
    }
  }

  static size_t scratch_bytes(const ChunkScanArgs& args, int64_t longest) {
    return Backward(args, {}, {}, longest, nullptr).arena.used;
  }

  static void backward(const ChunkScanArgs& args, const ChunkScanGrads& grads,
                       const ChunkTask& task, void* scratch) {
    Backward(args, grads, task, task.tokens.end - task.tokens.begin, scratch).run();
  }
};

template <class T>
constexpr ChunkScanBackwardKernel kernel_for() {
  return {Backward<T>::scratch_bytes, Backward<T>::backward};
}

}  // namespace

namespace cpu::MEMKERNELS_ISA {

ChunkScanBackwardKernel chunk_scan_backward_kernel(Dtype dtype) {
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
}  // namespace memkernels::scan
