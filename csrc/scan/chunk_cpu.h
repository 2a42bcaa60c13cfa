// What both directions of the chunk engine share: matrix products by panels, and the quantities of
// a chunk of tokens that do not depend on V or on the state.
//
// With d_l = exp(g_l) of token l, and all products of d within the chunk and elementwise in K:
//   before_i = prod_{l <= i} d_l     what the state has decayed by where token i reads it
//   after_j  = prod_{l > j} d_l      what token j's write has decayed by at the end of the chunk
//   scores_ij = scale sum_k q_ik k_jk prod_{j < l <= i} d_lk,  j <= i
//   keys_ij   =       sum_k k_ik k_jk prod_{j < l <= i} d_lk,  j < i     (delta rule)
// Products of numbers up to 1 neither overflow nor divide, and a decay of exact 0 stays one: with
// cumulated logarithms g = -inf would make NaN. A product loses a rounding a token, as the
// logarithms' sum does.
//
// With a decay of each channel, scores between blocks of kBlock tokens are matrix products of rows
// that have decayed to the start of the later block. Inside a block each pair is a sum of its own.
#pragma once

#include "core/cpu/arena.h"
#include "core/cpu/tile.h"
#include "scan/chunk_scan.h"
#include "scan/rows_cpu.h"

namespace memkernels::scan {
namespace {

// Tokens of a chunk, and of a block: multiples of the tile's rows and, of a chunk, its columns.
constexpr int kChunk = kTileRows == 8 ? 64 : 48;
constexpr int kBlock = 2 * kTileRows;

// ---- products ----

// Element (i, k) of the left operand, k in units.
template <class M>
struct LeftOf {
  const typename M::Unit* data;
  int64_t row, col;
};
template <class A>
using Left = LeftOf<Scalar<A>>;
// Column n of the right operand, and of some results, lies in panel n / kPanel.
template <class A>
struct Panels {
  A* data;
  int64_t stride;  // from panel to panel
  MK_INLINE A* operator[](int64_t p) const { return data + p * stride; }
};

// Which part of the left operand is not zero: everything, or what lies up to, or from, the
// diagonal.
enum class Part { all, lower, upper };

struct Fresh {
  template <class A>
  MK_INLINE Vec<A> operator()(int64_t, const A*) const {
    return Vec<A>{};
  }
};
struct Added {
  template <class A>
  MK_INLINE Vec<A> operator()(int64_t, const A* c) const {
    return load(c);
  }
};
template <class A>
struct Decayed {
  const A* factors;
  MK_INLINE Vec<A> operator()(int64_t row, const A* c) const { return load(c) * factors[row]; }
};

// A panel of C from start(row, C) + A * B; rows are rounded up to the tile's, and `inner`, elements
// of K, to units.
template <Part part = Part::all, class M, class Start>
void multiply_panel(int64_t rows, int64_t inner, LeftOf<M> a, const typename M::Unit* b,
                    typename M::A* c, int64_t ldc, const Start& start) {
  using A = typename M::A;
  constexpr int W = kLanes<A>, P = kPanel<A>;
  static_assert(kTileRows % M::kElements == 0);
  for (int64_t m = 0; m < rows; m += kTileRows) {
    const int64_t end = part == Part::lower && m + kTileRows < inner ? m + kTileRows : inner;
    const int64_t from = part == Part::upper ? m / M::kElements : 0, to = units<M>(end);
    Vec<A> acc[kTileRows][2];
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
      acc[i][0] = start(m + i, c + (m + i) * ldc);
      acc[i][1] = start(m + i, c + (m + i) * ldc + W);
    }
    if (to > from) {
      multiply<M>(to - from, 1, a.data + m * a.row + from * a.col, a.row, a.col, b + from * P, acc);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
      store(c + (m + i) * ldc, acc[i][0]);
      store(c + (m + i) * ldc + W, acc[i][1]);
    }
  }
}

// Solves (I - L) x = c in place, L strictly lower triangular; or (I - L^T) x = c.
template <class A>
void solve_panel(int64_t rows, const A* l, int64_t ld, A* c) {
  constexpr int W = kLanes<A>, P = kPanel<A>;
  for (int64_t m = 0; m < rows; m += kTileRows) {
    Vec<A> acc[kTileRows][2];
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
      acc[i][0] = load(c + (m + i) * P);
      acc[i][1] = load(c + (m + i) * P + W);
    }
    multiply<Scalar<A>>(m, 1, l + m * ld, ld, 1, c, acc);
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < i; ++j) {
        const Vec<A> factor = splat(l[(m + i) * ld + m + j]);
        acc[i][0] += factor * acc[j][0];
        acc[i][1] += factor * acc[j][1];
      }
      store(c + (m + i) * P, acc[i][0]);
      store(c + (m + i) * P + W, acc[i][1]);
    }
  }
}

template <class A>
void solve_panel_transposed(int64_t rows, const A* l, int64_t ld, A* c) {
  constexpr int W = kLanes<A>, P = kPanel<A>;
  for (int64_t m = rows - kTileRows; m >= 0; m -= kTileRows) {
    Vec<A> acc[kTileRows][2];
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
      acc[i][0] = load(c + (m + i) * P);
      acc[i][1] = load(c + (m + i) * P + W);
    }
    const int64_t after = m + kTileRows;
    multiply<Scalar<A>>(rows - after, 1, l + after * ld + m, 1, ld, c + after * P, acc);
#pragma GCC unroll 8
    for (int i = kTileRows - 1; i >= 0; --i) {
#pragma GCC unroll 8
      for (int j = i + 1; j < kTileRows; ++j) {
        const Vec<A> factor = splat(l[(m + j) * ld + m + i]);
        acc[i][0] += factor * acc[j][0];
        acc[i][1] += factor * acc[j][1];
      }
      store(c + (m + i) * P, acc[i][0]);
      store(c + (m + i) * P + W, acc[i][1]);
    }
  }
}

// [rows][ld] to panels of its columns; columns [0, cols), rounded up to panels.
template <class A>
void to_panels(const A* from, int64_t ld, int64_t rows, int64_t cols, Panels<A> to) {
  constexpr int W = kLanes<A>, P = kPanel<A>;
  for (int64_t c = 0; c < cols; c += P) {
    A* panel = to[c / P];
    for (int64_t r = 0; r < rows; ++r) {
      store(panel + r * P, load(from + r * ld + c));
      store(panel + r * P + W, load(from + r * ld + c + W));
    }
  }
}

// The same of the transpose: panels of kPanel rows of [rows][ld], `cols` of each, both rounded up
// to the lanes.
template <class A>
void to_panels_transposed(const A* from, int64_t ld, int64_t rows, int64_t cols, Panels<A> to) {
  constexpr int W = kLanes<A>, P = kPanel<A>;
  for (int64_t r = 0; r < rows; r += W) {
    A* panel = to[r / P] + r % P;
    for (int64_t c = 0; c < cols; c += W) {
      Vec<A> x[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) x[i] = load(from + (r + i) * ld + c);
      transpose<A>(x);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) store(panel + (c + i) * P, x[i]);
    }
  }
}

// ---- a chunk ----

inline int64_t offset_of(const TensorView& x, int64_t b, int64_t t, int64_t h) {
  return b * x.stride[0] + t * x.stride[1] + h * x.stride[2];
}

// Products that make U, scores of a scalar decay, and S have the operands of Math<T>; the rest is
// computed in A.
template <class T>
struct Chunk {
  using A = Acc<T>;
  using M = Math<T>;
  using Unit = typename M::Unit;
  static constexpr int W = kLanes<A>, P = kPanel<A>;

  const ChunkScanArgs& args;
  ChunkTask task;
  int64_t query_head;
  bool delta, channels;  // the delta rule; a decay of each channel
  int64_t K, V;
  int64_t ld;      // of rows of K elements: a multiple of P
  int64_t k_rows;  // K as rows of tiles and of transposed squares

  // [kChunk][ld], zeros past K and after the last token:
  A *q, *k;  // normalised, if asked for
  A *before, *after;
  A *read, *erase, *write;   // scale q before, -beta k before (delta rule), k after
  A* decay;                  // d of each channel; used with those only
  A *q_block, *k_block;      // likewise: rows decayed from the start of their block
  A* q_norm;                 // [kChunk] 1 / |q|, and
  A* k_norm;                 // of k
  A* total;                  // [k_rows] before, of the last token
  A *scores, *keys, *solve;  // [kChunk][kChunk]; solve = -beta keys
  A* mask;                   // [kChunk][kChunk] prod_{j < l <= i} d_l of a scalar decay
  A* beta;                   // [kChunk]
  A* gate;                   // [kChunk] the scalar d
  A* tail;                   // [kBlock][ld] keys of a block, decayed to its end, and
  A* block_total;            // [ld] what decays over all of it
  Panels<Unit> columns;      // k transposed: [kChunk / P][round_up(K, W)][P], units of it
  LeftOf<M> reads, erases, writes, weights;  // read, erase, write transposed, and scores
  struct {
    Unit *q, *k, *reads, *erases, *writes, *weights;
  } rounded = {};  // where operands lie if they are not what they are made of

  int64_t begin;        // the first token
  int64_t count, rows;  // tokens, and the same rounded up to the tile's rows

  Chunk(const ChunkScanArgs& args, const ChunkTask& task, Arena& arena)
      : args(args),
        task(task),
        query_head(task.head / (args.v.shape[2] / args.q.shape[2])),
        delta(args.beta.data != nullptr),
        channels(args.g.data != nullptr && args.g.ndim == 4),
        K(args.q.shape[3]),
        V(args.v.shape[3]),
        ld(round_up(K, P)),
        k_rows(round_up(round_up(K, kTileRows), W)) {
    A** const of_channels[] = {&q,     &k,     &before, &after,   &read,
                               &erase, &write, &decay,  &q_block, &k_block};
    // Transposed, a row is read up to k_rows.
    for (A** x : of_channels) *x = arena.take<A>(kChunk * ld + kTileRows);
    A** const of_pairs[] = {&scores, &keys, &solve, &mask};
    for (A** x : of_pairs) *x = arena.take<A>(kChunk * kChunk);
    A** const of_tokens[] = {&q_norm, &k_norm, &beta, &gate};
    for (A** x : of_tokens) *x = arena.take<A>(kChunk);
    total = arena.take<A>(ld + kTileRows);  // past ld its factors are of rows that nobody reads
    tail = arena.take<A>(kBlock * ld);
    block_total = arena.take<A>(ld);
    columns.stride = round_up(K, W) * P;
    columns.data = arena.take<Unit>(kChunk / P * columns.stride);
    if constexpr (M::kElements > 1) {
      Unit** const of_rows[] = {&rounded.q, &rounded.k, &rounded.reads, &rounded.erases,
                                &rounded.writes};
      for (Unit** x : of_rows) *x = arena.take<Unit>(units<M>(kChunk * ld));
      rounded.weights = arena.take<Unit>(units<M>(kChunk * kChunk));
    }
  }

  // Everything above, of the chunk from token t on.
  void prepare(int64_t t) {
    begin = t;
    const int64_t left = task.tokens.end - t;
    count = left < kChunk ? left : kChunk;
    rows = round_up(count, kTileRows);
    for (int64_t i = 0; i < kChunk; ++i) {
      read_token(args.q, i, q, q_norm);
      read_token(args.k, i, k, k_norm);
      beta[i] = delta && i < count ? scalar(args.beta, i) : A(0);
      read_gate(i);
    }
    decays();
    if (channels) {
      channel_scores();
    } else {
      scalar_scores();
    }
    reads = {as_a<M>(read, rows, ld, rounded.reads), units<M>(ld), 1};
    writes = {as_a_transposed<M>(write, rows, ld, rounded.writes), 1, ld};
    weights = {as_a<M>(scores, rows, kChunk, rounded.weights), units<M>(kChunk), 1};
    if (!delta) return;
    erases = {as_a<M>(erase, rows, ld, rounded.erases), units<M>(ld), 1};
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < kChunk; j += W) {
        store(solve + i * kChunk + j, load(keys + i * kChunk + j) * -beta[i]);
      }
    }
  }

  // A panel [count][P] as right operand: of two rows, an element of each is a unit.
  static const Unit* right(const A* panel, int64_t count, Unit* out) {
    return as_a_transposed<M>(panel, count, P, out);
  }

  // Columns [p * P, p * P + columns_of(p)) of V:
  int64_t columns_of(int64_t p) const { return V - p * P < P ? V - p * P : P; }

  // u [rows][P], what the tokens write, from the state at the chunk's beginning, a right operand,
  void values(int64_t p, const Unit* state, A* u) const {
    for (int64_t i = 0; i < rows; ++i) {
      A* row = u + i * P;
      if (i >= count) {
        read_row<A>(nullptr, 0, row, P);
        continue;
      }
      read_row(at<T>(args.v, task.tokens.batch, begin + i, task.head) + p * P, columns_of(p), row,
               P);
      if (!delta) continue;
      store(row, load(row) * beta[i]);
      store(row + W, load(row + W) * beta[i]);
    }
    if (!delta) return;
    multiply_panel(rows, K, erases, state, u, P, Added{});
    solve_panel(rows, solve, kChunk, u);
  }

  // and the state after it.
  void advance(const Unit* u, A* state) const {
    multiply_panel(K, count, writes, u, state, P, Decayed<A>{total});
  }

  // What token i reads of z, before which the chunk began.
  A normalizer(int64_t i, const A* z) const {
    A sums[2];
    sum_columns<A, 1>(K, sums,
                      [&](int64_t c, auto vector, Vec<A>* s) __attribute__((always_inline)) {
                        s[0] += vector.load(read + i * ld + c) * vector.load(z + c);
                      });
    sum_columns<A, 1>(i + 1, sums + 1,
                      [&](int64_t j, auto vector, Vec<A>* s) __attribute__((always_inline)) {
                        s[0] += vector.load(scores + i * kChunk + j);
                      });
    return sums[0] + sums[1];
  }

  void advance_z(A* z) const {
    for (int64_t c = 0; c < ld; c += W) {
      Vec<A> sum = load(z + c) * load(total + c);
      for (int64_t j = 0; j < count; ++j) sum += load(write + j * ld + c);
      store(z + c, sum);
    }
  }

 private:
  MK_INLINE Vec<A> decay_at(int64_t i, int64_t c) const {
    return channels ? load(decay + i * ld + c) : splat(gate[i]);
  }

  A scalar(const TensorView& x, int64_t i) const {
    const int64_t offset = offset_of(x, task.tokens.batch, begin + i, task.head);
    return static_cast<A>(load_scalar(x.data, x.dtype, offset));
  }

  void read_token(const TensorView& x, int64_t i, A* to, A* norms) const {
    A* row = to + i * ld;
    if (i >= count) return read_row<A>(nullptr, 0, row, ld);
    read_row(at<T>(x, task.tokens.batch, begin + i, query_head), K, row, ld);
    if (!args.qk_l2norm) return;
    norms[i] = inverse_norm(row, K);
    for (int64_t c = 0; c < ld; c += W) store(row + c, load(row + c) * norms[i]);
  }

  void read_gate(int64_t i) const {
    if (!channels) {
      gate[i] = i < count && args.g.data != nullptr ? exp(scalar(args.g, i)) : A(1);
      return;
    }
    A* row = decay + i * ld;
    const int64_t b = task.tokens.batch, t = begin + i;
    if (i >= count) {
      read_row<A>(nullptr, 0, row, ld);
    } else if (args.g.dtype == args.q.dtype) {
      read_row(at<T>(args.g, b, t, task.head), K, row, ld);
    } else {
      read_row(at<A>(args.g, b, t, task.head), K, row, ld);
    }
    for (int64_t c = 0; c < ld; c += W) store(row + c, exp_or_inf(load(row + c)));
  }

  void decays() const {
    const A scale = static_cast<A>(args.scale);
    for (int64_t c = 0; c < ld; c += W) {
      Vec<A> product = splat(A(1));
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t at = i * ld + c;
        product *= decay_at(i, c);
        store(before + at, product);
        store(read + at, load(q + at) * product * scale);
        if (delta) store(erase + at, load(k + at) * product * -beta[i]);
      }
      store(total + c, product);
      product = splat(A(1));
      for (int64_t i = rows - 1; i >= 0; --i) {
        const int64_t at = i * ld + c;
        store(after + at, product);
        store(write + at, load(k + at) * product);
        product *= decay_at(i, c);
      }
    }
  }

  // The part of products of rows with `columns` that lies below the diagonal, whole tiles.
  void lower_products(const Unit* x, A* out) const {
    const int64_t stride = units<M>(ld);
    for (int64_t p = 0; p < kChunk / P; ++p) {
      const int64_t first = p * P / kTileRows * kTileRows;
      if (first >= rows) break;
      multiply_panel(rows - first, K, LeftOf<M>{x + first * stride, stride, 1}, columns[p],
                     out + first * kChunk + p * P, kChunk, Fresh{});
    }
  }

  void scalar_scores() const {
    const Unit* const k_units = as_a<M>(k, kChunk, ld, rounded.k);
    to_panels_transposed(k_units, units<M>(ld), kChunk, units<M>(K), columns);
    lower_products(as_a<M>(q, rows, ld, rounded.q), scores);
    if (delta) lower_products(k_units, keys);
    const A scale = static_cast<A>(args.scale);
    Lane<A> lane;
    for (int i = 0; i < W; ++i) lane[i] = i;
    for (int64_t j = 0; j < kChunk; j += W) {
      Vec<A> m{};
      const Lane<A> column = lane + static_cast<typename IntOf<A>::type>(j);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t at = i * kChunk + j;
        const auto row = static_cast<typename IntOf<A>::type>(i);
        m = column == row ? splat(A(1)) : m * gate[i];
        store(mask + at, m);
        store(scores + at, column <= row ? load(scores + at) * m * scale : Vec<A>{});
        if (delta) store(keys + at, column < row ? load(keys + at) * m : Vec<A>{});
      }
    }
  }

  void channel_scores() const {
    for (int64_t i = 0; i < rows * kChunk; i += W) {
      store(scores + i, Vec<A>{});
      store(keys + i, Vec<A>{});
    }
    for (int64_t i = 0; i < kChunk * round_up(K, W); i += W) store(columns.data + i, Vec<A>{});
    block_rows();
    for (int64_t begin = 0; begin < rows; begin += kBlock) {
      const int64_t end = begin + kBlock < rows ? begin + kBlock : rows;
      for (int64_t p = 0; p * P < begin; ++p) {
        A* to = scores + begin * kChunk + p * P;
        multiply_panel(end - begin, K, Left<A>{q_block + begin * ld, ld, 1}, columns[p], to, kChunk,
                       Fresh{});
        if (!delta) continue;
        multiply_panel(end - begin, K, Left<A>{k_block + begin * ld, ld, 1}, columns[p],
                       keys + begin * kChunk + p * P, kChunk, Fresh{});
      }
      block_scores(begin, end);
      if (end < rows) append_columns(begin, end);
    }
    const A scale = static_cast<A>(args.scale);
    for (int64_t i = 0; i < rows * kChunk; i += W) store(scores + i, load(scores + i) * scale);
  }

  void block_rows() const {
    for (int64_t c = 0; c < ld; c += W) {
      Vec<A> product = splat(A(1));
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t at = i * ld + c;
        product = i % kBlock == 0 ? load(decay + at) : product * load(decay + at);
        store(q_block + at, load(q + at) * product);
        if (delta) store(k_block + at, load(k + at) * product);
      }
    }
  }

  // Pairs inside the block of tokens [begin, end). Overwrites what the panel of an earlier block
  // has left there.
  void block_scores(int64_t begin, int64_t end) const {
    constexpr int kRows = kBlock + W;  // sums of pairs that do not exist are zero
    for (int64_t j = begin; j < end; ++j) {
      Vec<A> by_q[kRows] = {}, by_k[kRows] = {};
      for (int64_t c = 0; c < ld; c += W) {
        Vec<A> key = load(k + j * ld + c);
        by_q[j - begin] += load(q + j * ld + c) * key;
        for (int64_t i = j + 1; i < end; ++i) {
          key *= load(decay + i * ld + c);
          by_q[i - begin] += load(q + i * ld + c) * key;
          if (delta) by_k[i - begin] += load(k + i * ld + c) * key;
        }
      }
      for (int64_t i = begin; i < end; i += W) {
        const Vec<A> of_q = sum_each<A>(by_q + (i - begin));
        const Vec<A> of_k = delta ? sum_each<A>(by_k + (i - begin)) : Vec<A>{};
        for (int l = 0; l < W && i + l < end; ++l) {
          scores[(i + l) * kChunk + j] = of_q[l];
          keys[(i + l) * kChunk + j] = of_k[l];
        }
      }
    }
    // Nothing lies past the diagonal.
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t j = i; j < kChunk; ++j) {
        if (j > i) scores[i * kChunk + j] = A(0);
        keys[i * kChunk + j] = A(0);
      }
    }
  }

  // Decays the columns of earlier blocks by this block's tokens, and adds this block's.
  void append_columns(int64_t begin, int64_t end) const {
    for (int64_t c = 0; c < ld; c += W) {
      Vec<A> product = splat(A(1));
      for (int64_t j = end - 1; j >= begin; --j) {
        store(tail + (j - begin) * ld + c, load(k + j * ld + c) * product);
        product *= load(decay + j * ld + c);
      }
      store(block_total + c, product);
    }
    for (int64_t c = 0; c < K; ++c) {
      for (int64_t j = 0; j < begin; j += W) {
        A* column = columns[j / P] + c * P + j % P;
        store(column, load(column) * block_total[c]);
      }
      for (int64_t j = begin; j < end; ++j) {
        columns[j / P][c * P + j % P] = tail[(j - begin) * ld + c];
      }
    }
  }
};

// Rows [n][h] of [N, HV, K]; zeros if absent.
template <class A>
void load_z(const TensorView& from, int64_t n, int64_t h, int64_t ld, A* to) {
  const A* row = static_cast<const A*>(from.data);
  if (row != nullptr) row += n * from.stride[0] + h * from.stride[1];
  read_row(row, row == nullptr ? 0 : from.shape[2], to, ld);
}

// Panels [begin, end) of a state, [k_rows][P] each; zeros if absent.
template <class A>
void load_state(const TensorView& from, int64_t n, int64_t h, int64_t begin, int64_t end,
                Panels<A> to, int64_t k_rows) {
  constexpr int W = kLanes<A>, P = kPanel<A>;
  if (from.data == nullptr) {
    memset(to.data, 0, (end - begin) * to.stride * sizeof(A));
    return;
  }
  const int64_t K = from.shape[2], V = from.shape[3];
  const A* const state = static_cast<const A*>(from.data) + n * from.stride[0] + h * from.stride[1];
  for (int64_t p = begin; p < end; ++p) {
    A* panel = to[p - begin];
    for (int64_t r = 0; r < k_rows; ++r) {
      if (r >= K) {
        store(panel + r * P, Vec<A>{});
        store(panel + r * P + W, Vec<A>{});
      } else {
        const int64_t columns = V - p * P < P ? V - p * P : P;
        read_row(state + r * from.stride[2] + p * P, columns, panel + r * P, P);
      }
    }
  }
}

template <class A>
void store_state(const TensorView& to, int64_t n, int64_t h, int64_t begin, int64_t end,
                 Panels<A> from) {
  constexpr int P = kPanel<A>;
  const int64_t K = to.shape[2], V = to.shape[3];
  A* const state = static_cast<A*>(to.data) + (n * to.shape[1] + h) * K * V;
  for (int64_t p = begin; p < end; ++p) {
    const int64_t columns = V - p * P < P ? V - p * P : P;
    for (int64_t r = 0; r < K; ++r) {
      for_columns<A>(columns, [&](int64_t c, auto vector, int) __attribute__((always_inline)) {
        vector.store(state + r * V + p * P + c, load(from[p - begin] + r * P + c));
      });
    }
  }
}

}  // namespace
}  // namespace memkernels::scan
