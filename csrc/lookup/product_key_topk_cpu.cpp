// The k best of s1[i] + s2[j] over all i, j < N, with s1 = q1 . K1 and s2 = q2 . K2. They are among
// the pairs of the k best of each half; with both in order, among those of ranks r1 r2 <= k.
//
// Cost: 4 N Dk flops a token and head for the scores of both halves, whose N numbers are then
// compared twice: with each other, for a bound that k of them reach, and with that bound. What
// passes, some 1.4 k, is put in order by counting.
#include "lookup/product_key_topk.h"

#include "attention/few_rows_cpu.h"
#include "core/cpu/arena.h"
#include "selection/kth_largest_cpu.h"

namespace memkernels::lookup {
namespace {

using attention::for_row_groups;
using attention::kBlockKeys;
using attention::kTileKeys;
using attention::score_tile;
using selection::Key;
using selection::key_of;
using selection::keys_of;
using selection::kth_largest;
using selection::value_of;

constexpr int64_t kMost = 128;  // k

constexpr int64_t num_pairs(int64_t k) {  // of ranks r1 r2 <= k
  int64_t pairs = 0;
  for (int64_t rank = 1; rank <= k; ++rank) pairs += k / rank;
  return pairs;
}

// All pairs may be equal, and all of them are kept until their order is known. Of more scores of a
// half that pass a bound the worst are dropped.
constexpr int64_t kRoom = 704;
static_assert(num_pairs(kMost) < kRoom);
// Scores that are compared before any of them is picked out.
constexpr int64_t kWord = 64;

// What no score is found below: all but NaN and -inf reach it.
template <class A>
constexpr A kLowest = sizeof(A) == 8 ? A(-1.7976931348623157e308) : A(-3.40282347e38f);

template <class A>
MK_INLINE Lane<A> lane_numbers() {
  Lane<A> lanes;
  for (int i = 0; i < kLanes<A>; ++i) lanes[i] = i;
  return lanes;
}

// Scores that may be among the k best, in the order in which they were found.
template <class A>
struct Candidates {
  static constexpr int W = kLanes<A>;

  A values[kRoom + W];
  int32_t indices[kRoom + W];
  int64_t found;
  A least;  // what another one must reach

  void start(A bound) {
    found = 0;
    least = bound > kLowest<A> ? bound : kLowest<A>;
  }

  // `count` scores with indices from `first` on, padded with -inf to whole words.
  void add(const A* scores, int64_t count, int64_t first, int64_t k) {
    for (int64_t word = 0; word < count; word += kWord) {
      uint64_t bits = 0;
#pragma GCC unroll 16
      for (int i = 0; i < kWord; i += W) {
        bits |= static_cast<uint64_t>(lane_bits<A>(load(scores + word + i) >= least)) << i;
      }
      for (; bits != 0; bits &= bits - 1) {
        const int64_t i = word + __builtin_ctzll(bits);
        values[found] = scores[i];
        indices[found++] = static_cast<int32_t>(first + i);
        if (found == kRoom) keep_best(k);
      }
    }
  }

  __attribute__((noinline)) void keep_best(int64_t k) {
    Key<A> keys[kRoom + W];
    for (int64_t i = 0; i < found; ++i) keys[i] = key_of<A>(values[i]);
    const Key<A> cut = kth_largest<A>(keys, found, k);
    int64_t equal = k, kept = 0;
    for (int64_t i = 0; i < found; ++i) equal -= keys[i] > cut;
    for (int64_t i = 0; i < found; ++i) {
      if (keys[i] < cut || (keys[i] == cut && equal-- <= 0)) continue;
      values[kept] = values[i];
      indices[kept++] = indices[i];
    }
    found = kept;
    least = value_of<A>(cut);
  }

  // The first `count` of them, larger ones first and of equal ones those found first.
  void sort(int64_t count, A* best, int32_t* best_indices) {
    for (int64_t i = found; i < round_up(found, W); ++i) values[i] = -kInfinity<A>;
    const Lane<A> lanes = lane_numbers<A>();
    for (int64_t i = 0; i < found; i += W) {
      // A number's rank is how many precede it: those larger, and equal ones found before.
      const Vec<A> x = load(values + i);
      Lane<A> ranks{};
      for (int64_t j = 0; j < i; ++j) ranks -= splat(values[j]) >= x;
      for (int j = 0; j < W; ++j) {
        const Vec<A> y = splat(values[i + j]);
        ranks -= (y > x) | ((y == x) & (lanes > j));
      }
      for (int64_t j = i + W; j < found; ++j) ranks -= splat(values[j]) > x;
      for (int lane = 0; lane < W && i + lane < found; ++lane) {
        if (ranks[lane] >= count) continue;
        best[ranks[lane]] = x[lane];
        best_indices[ranks[lane]] = indices[i + lane];
      }
    }
  }
};

template <class T>
struct ProductKeys {
  using A = Acc<T>;
  using M = Math<T>;
  using Unit = typename M::Unit;
  static constexpr int W = kLanes<A>;
  static constexpr int P = kPanel<A>;

  struct Best {
    A values[kMost + W];
    int32_t indices[kMost];
  };

  struct Scratch {
    const T** rows;       // of queries or keys
    Unit* q;              // [kProductKeyTokens] of units of Dk
    A* scores;            // [kProductKeyTokens][kHalfBlock]
    A* few;               // [kFewTokens][kBlockKeys]
    Candidates<A>* half;  // [kProductKeyTokens]
    Best* best;           // [kProductKeyTokens][2]
    Candidates<A>* pairs;
    A* sums;         // [kRoom]
    int32_t* ranks;  // [kRoom]: of a pair, as two bytes
    size_t bytes;
    Scratch(const ProductKeyArgs& args, void* base) {
      const int64_t dim = round_up(args.query.shape[3], kPair<T>);
      Arena arena{static_cast<char*>(base)};
      rows = arena.take<const T*>(kHalfBlock);
      q = arena.take<Unit>(kProductKeyTokens * dim);
      scores = arena.take<A>(kProductKeyTokens * kHalfBlock);
      few = arena.take<A>(kFewTokens * kBlockKeys);
      half = arena.take<Candidates<A>>(kProductKeyTokens);
      best = arena.take<Best>(kProductKeyTokens * 2);
      pairs = arena.take<Candidates<A>>(1);
      sums = arena.take<A>(kRoom + kWord);
      ranks = arena.take<int32_t>(kRoom + kWord);
      bytes = arena.used;
    }
  };

  static size_t scratch_bytes(const ProductKeyArgs& args) { return Scratch(args, nullptr).bytes; }

  static int64_t padded_units(const ProductKeyArgs& args) {
    return round_up(args.query.shape[3], kPair<T>) / M::kElements;
  }

  static size_t packed_bytes(const ProductKeyArgs& args) {
    return round_up(args.keys.shape[2], P) * padded_units(args) * sizeof(Unit);
  }

  static const T* key(const ProductKeyArgs& args, int64_t head, int half, int64_t i) {
    const int64_t* stride = args.keys.stride;
    return static_cast<const T*>(args.keys.data) + head * stride[0] + half * stride[1] +
           i * stride[2];
  }

  static void pack(const ProductKeyArgs& args, int64_t head, int half, int64_t begin, int64_t end,
                   void* packed) {
    const T* rows[kHalfBlock];
    const int64_t count = round_up(end - begin, P);
    for (int64_t i = 0; i < count; ++i) {
      rows[i] = begin + i < end ? key(args, head, half, begin + i) : nullptr;
    }
    pack_b_transposed<T>(rows, count, args.query.shape[3],
                         static_cast<Unit*>(packed) + begin * padded_units(args));
  }

  const ProductKeyArgs& args;
  const int64_t head, first_token, num_tokens;
  const int64_t dim, size, k;
  const Scratch s;

  static void run(const ProductKeyArgs& args, int64_t head, int64_t first_token, int64_t num_tokens,
                  const void* packed, void* scratch) {
    const ProductKeys self{args,
                           head,
                           first_token,
                           num_tokens,
                           args.query.shape[3],
                           args.keys.shape[2],
                           args.scores.shape[2],
                           Scratch(args, scratch)};
    for (int half = 0; half < 2; ++half) {
      self.search(half, packed == nullptr ? nullptr
                                          : static_cast<const char*>(packed) +
                                                half * round_up(packed_bytes(args), 64));
    }
    int64_t pairs = 0;
    for (int64_t i = 0; i < self.k; ++i) {
      for (int64_t j = 0; j < self.k / (i + 1); ++j) {
        self.s.ranks[pairs++] = static_cast<int32_t>(i << 8 | j);
      }
    }
    for (int64_t t = 0; t < num_tokens; ++t) self.merge(t);
  }

  // The k best of one half for every token.
  void search(int half, const void* packed) const {
    const int64_t* stride = args.query.stride;
    for (int64_t t = 0; t < kProductKeyTokens; ++t) {
      s.rows[t] = t < num_tokens
                      ? static_cast<const T*>(args.query.data) + (first_token + t) * stride[0] +
                            head * stride[1] + half * stride[2]
                      : nullptr;
    }
    const int64_t rows = round_up(num_tokens, kTileRows);
    const int64_t q_stride = pack_a<T>(s.rows, rows, dim, s.q);
    for (int64_t begin = 0; begin < size; begin += kHalfBlock) {
      const int64_t count = size - begin < kHalfBlock ? size - begin : kHalfBlock;
      if (packed != nullptr) {
        dot_products<M>(rows, round_up(count, P), padded_units(args), s.q, q_stride,
                        static_cast<const Unit*>(packed) + begin * padded_units(args), s.scores,
                        kHalfBlock);
      } else {
        score_few(half, begin, count, q_stride);
      }
      for (int64_t t = 0; t < num_tokens; ++t) {
        A* scores = s.scores + t * kHalfBlock;
        for (int64_t i = count; i < round_up(count, kWord); ++i) scores[i] = -kInfinity<A>;
        if (begin == 0) s.half[t].start(bound(scores, count));
        s.half[t].add(scores, count, begin, k);
      }
    }
    for (int64_t t = 0; t < num_tokens; ++t) {
      Best& best = s.best[2 * t + half];
      const int64_t found = s.half[t].found < k ? s.half[t].found : k;
      for (int64_t i = found; i < k + W; ++i) best.values[i] = -kInfinity<A>;
      s.half[t].sort(k, best.values, best.indices);
    }
  }

  void score_few(int half, int64_t begin, int64_t count, int64_t q_stride) const {
    for (int64_t at = 0; at < count; at += kBlockKeys) {
      for (int64_t i = 0; i < kBlockKeys; ++i) {
        s.rows[i] = key(args, head, half, begin + (at + i < count ? at + i : at));
      }
      for_row_groups<A>(num_tokens, [&](auto rows_at_once, int64_t r) {
        constexpr int R = decltype(rows_at_once)::value;
        for (int64_t j = 0; j < kBlockKeys; j += kTileKeys<T, R>) {
          score_tile<T, R>(s.q + r * q_stride, q_stride, s.rows + j, dim,
                           s.few + r * kBlockKeys + j);
        }
      });
      for (int64_t t = 0; t < num_tokens; ++t) {
        memcpy(s.scores + t * kHalfBlock + at, s.few + t * kBlockKeys, kBlockKeys * sizeof(A));
      }
    }
  }

  // A number that k of the scores reach, or -inf: the k-th of the maxima of at least 2 k groups.
  A bound(const A* scores, int64_t count) const {
    constexpr int kMostGroups = 2 * kMost / W;
    const int64_t groups = round_up(2 * k, W) / W;
    if (count < 2 * groups * W) return -kInfinity<A>;
    Vec<A> most[kMostGroups];
    for (int64_t g = 0; g < groups; ++g) most[g] = splat(-kInfinity<A>);
    for (int64_t i = 0; i + groups * W <= count; i += groups * W) {
      for (int64_t g = 0; g < groups; ++g) {
        const Vec<A> x = load(scores + i + g * W);
        most[g] = x > most[g] ? x : most[g];
      }
    }
    Key<A> keys[kMostGroups * W];
    for (int64_t g = 0; g < groups; ++g) store(keys + g * W, keys_of<A>(most[g]));
    return value_of<A>(kth_largest<A>(keys, groups * W, k, k + k / 8));
  }

  void merge(int64_t t) const {
    const Best &first = s.best[2 * t], &second = s.best[2 * t + 1];
    // Pairs of ranks up to i + 1 and k / (i + 1), rounded up, are k that reach the sum of the last.
    A bound = -kInfinity<A>;
    for (int64_t i = 0; i < k; ++i) {
      const A last = first.values[i] + second.values[(k + i) / (i + 1) - 1];
      if (last > bound) bound = last;
    }
    int64_t count = 0;
    for (int64_t i = 0; i < k; ++i) {
      const int64_t ranks = k / (i + 1);
      for (int64_t j = 0; j < ranks; j += W) {
        store(s.sums + count + j, first.values[i] + load(second.values + j));
      }
      count += ranks;
    }
    for (int64_t i = count; i < round_up(count, kWord); ++i) s.sums[i] = -kInfinity<A>;
    auto& pairs = *s.pairs;
    pairs.start(bound);
    pairs.add(s.sums, count, 0, k);
    int32_t places[kRoom];
    pairs.sort(pairs.found, s.sums, places);

    int64_t sorted[kRoom];
    for (int64_t i = 0; i < pairs.found; ++i) {
      const int32_t ranks = s.ranks[places[i]];
      const int64_t index =
          int64_t{first.indices[ranks >> 8]} * size + second.indices[ranks & 0xff];
      int64_t at = i;  // among equal ones by index
      for (; at > 0 && s.sums[at - 1] == s.sums[i] && sorted[at - 1] > index; --at) {
        sorted[at] = sorted[at - 1];
      }
      sorted[at] = index;
    }
    const int64_t out = ((first_token + t) * args.query.shape[1] + head) * k;
    A* scores = static_cast<A*>(args.scores.data) + out;
    int64_t* indices = static_cast<int64_t*>(args.indices.data) + out;
    for (int64_t i = 0; i < k; ++i) {
      scores[i] = i < pairs.found ? s.sums[i] : -kInfinity<A>;
      indices[i] = i < pairs.found ? sorted[i] : -1;
    }
  }
};

template <class T>
constexpr ProductKeyKernel kernel_for() {
  return {ProductKeys<T>::packed_bytes, ProductKeys<T>::pack, ProductKeys<T>::scratch_bytes,
          ProductKeys<T>::run};
}

}  // namespace

namespace cpu::MEMKERNELS_ISA {

ProductKeyKernel product_key_kernel(Dtype dtype) {
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
}  // namespace memkernels::lookup
