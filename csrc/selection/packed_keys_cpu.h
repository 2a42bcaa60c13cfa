// A stretch of the keys of one head, packed once, while blocks of queries pass by.
#pragma once

#include "attention/block_cpu.h"
#include "selection/stretch.h"

namespace memkernels::selection {
namespace {

using attention::HeadBlock;
using attention::kBlockKeys;
using attention::KeyBlock;
using attention::KeyRange;
using attention::Problem;
using attention::Sequence;

template <class T>
struct PackedKeys {
  using A = Acc<T>;
  using M = Math<T>;
  using Unit = typename M::Unit;

  Unit* q;           // [rows] of units of dim
  Unit* columns;     // [keys] of units of dim, as columns of a product
  A* addends;        // [keys]
  A* scores;         // [rows][kBlockKeys]
  const T** q_rows;  // [rows], null beyond the last query
  const Problem& p;
  const int64_t dim;
  int64_t sequence = 0, head = 0, begin = 0, end = 0;
  int64_t q_stride = 0;
  bool has_addend = false;

  PackedKeys(const Problem& p, int64_t keys, Arena& arena) : p(p), dim(round_up(p.dim, kPair<T>)) {
    const int64_t rows = most_rows(p);
    q = arena.take<Unit>(rows * dim);
    columns = arena.take<Unit>(keys * dim);
    addends = arena.take<A>(keys);
    scores = arena.take<A>(rows * kBlockKeys);
    q_rows = arena.take<const T*>(rows);
  }

  static int64_t most_rows(const Problem& p) {
    return round_up(block_queries(p.group) * p.group, kTileRows);
  }

  const Sequence& seq() const { return p.sequences[sequence]; }
  int64_t position(int64_t i) const { return seq().kv_len - seq().num_q + i; }

  // Takes keys [begin, end) of a sequence; visit(keys, at) sees each block, `at` keys from begin.
  template <class Visit>
  void pack(int64_t of_sequence, int64_t of_head, int64_t from, int64_t to, const Visit& visit) {
    sequence = of_sequence;
    head = of_head;
    begin = from;
    end = to;
    has_addend = false;
    KeyBlock<T> block;
    HeadBlock<T> keys;
    for (int64_t at = 0; at < end - begin; at += kBlockKeys) {
      const int64_t left = end - begin - at;
      block.locate(p, sequence, head, begin + at, left < kBlockKeys ? left : kBlockKeys);
      keys.select(p, block, head);
      pack_b_transposed<T>(keys.k, kBlockKeys, p.dim, columns + at * (dim / M::kElements));
      has_addend |= keys.has_addend;
      for (int i = 0; i < kBlockKeys; ++i) {
        addends[at + i] = keys.has_addend ? keys.addend[i] : A(0);
      }
      visit(keys, at);
    }
  }

  // What a block of queries sees of a block of keys, `at` keys from begin.
  struct Block {
    int64_t at, count;
    bool hides;  // keys from queries
  };

  // Calls visit(block) with the scores q . k of queries [i0, i1) of the sequence, for every block
  // of keys that any of them sees.
  template <class Visit>
  void score(int64_t i0, int64_t i1, const Visit& visit) {
    const int64_t rows = (i1 - i0) * p.group, padded = round_up(rows, kTileRows);
    const KeyRange seen =
        attention::visible_keys(p, head, seq().kv_len, position(i0), position(i1 - 1));
    bool packed = false;
    for (int64_t first = begin; first < end; first += kBlockKeys) {
      const int64_t last = first + kBlockKeys < end ? first + kBlockKeys : end;
      if (first >= seen.sinks && (last <= seen.begin || first >= seen.end)) continue;
      if (!packed) pack_queries(i0, rows, padded);
      packed = true;
      matmul<M>(padded, kBlockKeys, dim / M::kElements, q, q_stride, 1,
                columns + (first - begin) * (dim / M::kElements), scores, kBlockKeys, false);
      const bool all = attention::all_visible(p, head, seq().kv_len, position(i0), position(i1 - 1),
                                              first, last - first);
      visit(Block{first - begin, last - first, !all});
    }
  }

  // The addends of a block, null if there are none.
  const A* addends_at(const Block& block) const {
    return has_addend ? addends + block.at : nullptr;
  }

 private:
  void pack_queries(int64_t i0, int64_t rows, int64_t padded) {
    for (int64_t r = 0; r < padded; ++r) {
      const int64_t token = seq().q_begin + i0 + r / p.group;
      q_rows[r] = r < rows ? reinterpret_cast<const T*>(p.q.data) + token * p.q.token_stride +
                                 (head * p.group + r % p.group) * p.q.head_stride
                           : nullptr;
    }
    q_stride = pack_a<T>(q_rows, padded, p.dim, q);
  }
};

}  // namespace
}  // namespace memkernels::selection
