// One block of keys on the CPU, shared by forward and backward: where its rows lie, and how a
// score becomes a logit.
#pragma once

#include "attention/problem.h"
#include "core/cpu/arena.h"
#include "core/cpu/tile.h"

namespace memkernels::attention {
namespace {

// Keys a block: K, V and scores of a block stay in L2 beside the queries.
constexpr int kBlockKeys = 64;
// The same as rows of a product, which come in tiles.
constexpr int kKeyRows = (kBlockKeys + kTileRows - 1) / kTileRows * kTileRows;

template <class T>
struct Layout {
  int64_t dim, dim_v;  // padded to kPair
  explicit Layout(const Problem& p)
      : dim(round_up(p.dim, kPair<T>)), dim_v(round_up(p.dim_v, kPair<T>)) {}
};

// Row pointers of keys [begin, begin + count) of a sequence for head 0; null where the page is
// absent, and beyond `count`.
template <class T>
struct KeyBlock {
  const T* k[kBlockKeys];
  const T* v[kBlockKeys];
  int64_t bias[kBlockKeys];  // offsets into key_bias
  int64_t begin = 0, count = 0;
  bool gaps = false;  // a null among them

  // kv_head matters only where heads have index lists of their own.
  void locate(const Problem& p, int64_t b, int64_t kv_head, int64_t first, int64_t n) {
    begin = first;
    count = n;
    gaps = n < kBlockKeys;
    const T* k_data = reinterpret_cast<const T*>(p.k.data);
    const T* v_data = reinterpret_cast<const T*>(p.v.data);
    for_each_key(p, b, kv_head, first, n, [&](int64_t i, int64_t outer, int64_t token) {
      const bool absent = outer < 0;
      gaps |= absent;
      k[i] = absent ? nullptr : k_data + outer * p.k.outer_stride + token * p.k.token_stride;
      v[i] = absent ? nullptr : v_data + outer * p.v.outer_stride + token * p.v.token_stride;
      bias[i] = outer * p.key_bias.outer_stride + token * p.key_bias.token_stride;
    });
    for (int64_t i = n; i < kBlockKeys; ++i) k[i] = v[i] = nullptr;
  }

  // What is added to the logits of one head: the key bias, and -inf where there is no key.
  bool has_addend(const Problem& p) const { return gaps || p.key_bias.data != nullptr; }

  void addends(const Problem& p, int64_t head, Acc<T>* out) const {
    for (int i = 0; i < kBlockKeys; ++i) {
      out[i] = k[i] == nullptr ? -kInfinity<Acc<T>> : bias_of(p, i, head);
    }
  }

  // A key whose bias is -inf counts as absent: its value is never read.
  bool hidden(const Problem& p, int64_t i, int64_t head) const {
    return k[i] == nullptr || bias_of(p, i, head) == -kInfinity<Acc<T>>;
  }

  Acc<T> bias_of(const Problem& p, int64_t i, int64_t head) const {
    if (p.key_bias.data == nullptr) return 0;
    return static_cast<Acc<T>>(
        load_scalar(p.key_bias.data, p.key_bias.dtype, bias[i] + head * p.key_bias.head_stride));
  }
};

// The rows of one KV head in a block; null where there is no key, or a hidden one.
template <class T>
struct HeadBlock {
  const T* k[kKeyRows] = {};
  const T* v[kBlockKeys];
  Acc<T> addend[kBlockKeys];
  bool has_addend;

  void select(const Problem& p, const KeyBlock<T>& block, int64_t head) {
    has_addend = block.has_addend(p);
    if (has_addend) block.addends(p, head, addend);
    for (int i = 0; i < kBlockKeys; ++i) {
      const bool hidden = has_addend && addend[i] == -kInfinity<Acc<T>>;
      k[i] = hidden ? nullptr : block.k[i] + head * p.k.head_stride;
      v[i] = hidden ? nullptr : block.v[i] + head * p.v.head_stride;
    }
  }
};

// Calls visit(first, count) for the blocks of keys that queries at positions [first, last] of a
// sequence of length L see and that lie in [clip_begin, clip_end).
template <class Visit>
MK_INLINE void for_each_block(const KeyRange& keys, int64_t clip_begin, int64_t clip_end,
                              const Visit& visit) {
  const int64_t parts[2][2] = {{0, keys.sinks}, {keys.begin, keys.end}};
  for (const auto& part : parts) {
    const int64_t begin = part[0] > clip_begin ? part[0] : clip_begin;
    const int64_t end = part[1] < clip_end ? part[1] : clip_end;
    for (int64_t j = begin; j < end; j += kBlockKeys) {
      visit(j, end - j < kBlockKeys ? end - j : kBlockKeys);
    }
  }
}

// True if every query at positions [first, last] sees every key of [begin, begin + count).
MK_INLINE bool all_visible(const Problem& p, int64_t kv_head, int64_t L, int64_t first,
                           int64_t last, int64_t begin, int64_t count) {
  const KeyRange lowest = visible_keys(p, kv_head, L, first, first);
  const KeyRange highest = visible_keys(p, kv_head, L, last, last);
  return begin + count <= lowest.end && (begin >= highest.begin || begin + count <= highest.sinks);
}

// Scores q.k of one row to logits, in place: scale, softcap, key bias, visibility. `keys` is null
// where every key of the block is visible.
template <class A>
MK_INLINE void to_logits(A* scores, const Problem& p, const A* addend, int64_t begin,
                         const KeyRange* keys) {
  constexpr int W = kLanes<A>;
  const A scale = static_cast<A>(p.softcap > 0 ? p.scale / p.softcap : p.scale);
  const A softcap = static_cast<A>(p.softcap);
  for (int j = 0; j < kBlockKeys; j += W) {
    Vec<A> s = load(scores + j) * scale;
    if (softcap > 0) s = tanh(s) * softcap;
    if (addend != nullptr) {
      const Vec<A> extra = load(addend + j);
      s = extra == -kInfinity<A> ? extra : s + extra;
    }
    store(scores + j, s);
  }
  if (keys == nullptr) return;
  for (int j = 0; j < kBlockKeys; ++j) {
    const int64_t key = begin + j;
    const bool visible = key < keys->sinks || (key >= keys->begin && key < keys->end);
    if (!visible) scores[j] = -kInfinity<A>;
  }
}

}  // namespace
}  // namespace memkernels::attention
