// The k largest scores of a row, as indices in rising order; of equal ones the first.
//
// A row is read twice, and little else is done at that rate. First the maxima of groups of scores:
// the k-th largest of them is a floor under the k-th largest score, which at most k * group
// scores exceed. Then the candidates that reach it, among which the k-th largest is
// found. Nothing is sorted, and equal scores cost no more than others.
#include "selection/select.h"

#include "core/cpu/arena.h"
#include "selection/kth_largest_cpu.h"

namespace memkernels::selection {
namespace {

// Groups there are for every score wanted: about a quarter of them will hold one.
constexpr int64_t kGroupsPerScore = 4;

template <class T>
struct Select {
  using A = Acc<T>;
  static constexpr int W = kLanes<A>;

  // Scores a group has, so that there are enough groups.
  static int64_t group_size(int64_t n, int64_t k) {
    int64_t size = 1;
    while (n / (2 * size) >= kGroupsPerScore * k) size *= 2;
    return size;
  }

  struct Scratch {
    Key<A>* keys;  // of the group maxima, then of the candidates
    A* scores;     // of the candidates
    int32_t* indices;
    size_t bytes;

    Scratch(const SelectRow& row, void* base) {
      // Less than 2 * kGroupsPerScore * k groups; candidates at most k * group above the
      // floor and k on it. Where -inf may be selected, everything can be a candidate.
      const int64_t n = row.length, groups = 2 * kGroupsPerScore * row.k;
      const int64_t candidates = n / kGroupsPerScore + row.k;
      const int64_t most = groups > candidates ? groups : candidates;
      const int64_t size = (row.any || n < most ? n : most) + 2 * W;
      Arena arena{static_cast<char*>(base)};
      keys = arena.take<Key<A>>(size);
      scores = arena.take<A>(size);
      indices = arena.take<int32_t>(size);
      bytes = arena.used;
    }
  };

  static size_t scratch_bytes(const SelectRow& largest) { return Scratch(largest, nullptr).bytes; }

  // The key of a score that at least k of n scores reach, if that many lie above -inf.
  static Key<A> find_floor(const T* scores, int64_t n, int64_t k, Key<A>* keys) {
    const int64_t group = group_size(n, k), block = group * W;
    int64_t num_groups = 0, i = 0;
    for (; i + block <= n; num_groups += W) {
      Vec<A> most = splat(-kInfinity<A>);
      for (const int64_t end = i + block; i < end; i += W)
        most = vmax(load_ordered(scores + i), most);
      store(keys + num_groups, keys_of<A>(most));
    }
    if (i < n) {
      Vec<A> most = splat(-kInfinity<A>);
      for (; i < n; i += W) most = vmax(load_last(scores, i, n), most);
      store(keys + num_groups, keys_of<A>(most));
      num_groups += W;
    }
    return kth_largest<A>(keys, num_groups, k);
  }

  // W scores from the i-th on, those at n and beyond -inf.
  static MK_INLINE Vec<A> load_last(const T* scores, int64_t i, int64_t n) {
    if (i + W <= n) return load_ordered(scores + i);
    T padded[W] = {};
    for (int64_t j = i; j < n; ++j) padded[j - i] = scores[j];
    Vec<A> x = load_ordered(padded);
    for (int64_t j = n - i; j < W; ++j) x[j] = -kInfinity<A>;
    return x;
  }

  // Writes the indices of the k best of scores [0, n), plus `offset`; returns how many there are.
  static int64_t choose(const T* scores, int64_t n, int64_t k, const SelectRow& row,
                        const Scratch& s, int32_t offset, int32_t* out) {
    if (k <= 0 || n <= 0) return 0;
    const A lowest = static_cast<A>(row.lowest);
    const Key<A> none = key_of<A>(-kInfinity<A>);
    Key<A> floor = none;
    if (k < n) floor = find_floor(scores, n, k, s.keys);
    if (!row.any && lowest > -kInfinity<A> && key_of<A>(lowest) > floor) floor = key_of<A>(lowest);

    // Those above the floor, and the first k on it. Below -inf there is no floor.
    const bool bounded = floor > none;
    const A least = value_of<A>(floor);
    int64_t count = 0, on_floor = 0;
    const auto take = [&](int64_t i, uint32_t bits) __attribute__((always_inline)) {
      for (; bits != 0; bits &= bits - 1) {
        const int64_t index = i + __builtin_ctz(bits);
        const A score = to_acc(scores[index]);
        if (bounded && score == least && on_floor++ >= k) continue;
        s.scores[count] = score;
        s.indices[count++] = static_cast<int32_t>(index);
      }
    };
    int64_t i = 0;
    constexpr int kAtOnce = 32 / W;
    for (; bounded && i + 32 <= n; i += 32) {
      uint32_t bits = 0;
#pragma GCC unroll 16
      for (int j = 0; j < kAtOnce; ++j) {
        bits |= lane_bits<A>(load_ordered(scores + i + j * W) >= least) << (j * W);
      }
      take(i, bits);
    }
    for (; i < n; i += W) {
      const Vec<A> x = load_last(scores, i, n);
      uint32_t bits = lane_bits<A>(bounded ? x >= least : x > -kInfinity<A>);
      if (row.any && !bounded) bits = (uint32_t{1} << (n - i < W ? n - i : W)) - 1;
      take(i, bits);
    }

    if (count > k) count = keep_best(count, k, s);
    for (int64_t c = 0; c < count; ++c) out[c] = s.indices[c] + offset;
    return count;
  }

  // Of `count` candidates the k best, moved together.
  static int64_t keep_best(int64_t count, int64_t k, const Scratch& s) {
    for (int64_t c = 0; c < count; c += W) store(s.keys + c, keys_of<A>(load(s.scores + c)));
    const Key<A> cut = kth_largest<A>(s.keys, count, k);
    int64_t equal = k - count_reaching<A>(s.keys, round_up(count, W), static_cast<Key<A>>(cut + 1));
    int64_t kept = 0;
    for (int64_t c = 0; c < count; ++c) {
      s.indices[kept] = s.indices[c];
      const bool ties = s.keys[c] == cut && equal > 0;
      equal -= ties;
      kept += s.keys[c] > cut || ties;
    }
    return kept;
  }

  static void run(const SelectRow& row, void* scratch) {
    const Scratch s(row, scratch);
    const T* scores = static_cast<const T*>(row.scores);
    const int64_t first = row.keep_first < row.length ? row.keep_first : row.length;
    const int64_t rest = row.length - first;
    const int64_t last = row.keep_last < rest ? row.keep_last : rest;
    int32_t* out = row.out;
    for (int64_t i = 0; i < first; ++i) *out++ = static_cast<int32_t>(i);
    out += choose(scores + first, rest - last, row.k - first - last, row, s,
                  static_cast<int32_t>(first), out);
    for (int64_t i = row.length - last; i < row.length; ++i) *out++ = static_cast<int32_t>(i);
    while (out < row.out + row.room) *out++ = -1;
  }
};

template <class T>
constexpr SelectKernel kernel_for() {
  return {Select<T>::scratch_bytes, Select<T>::run};
}

}  // namespace

namespace cpu::MEMKERNELS_ISA {

SelectKernel select_kernel(Dtype dtype) {
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
