// The k-th largest of some numbers, by bisecting the range of values: counting how many reach the
// middle is all that is done, a vector at a time.
#pragma once

#include "core/cpu/simd.h"

namespace memkernels::selection {
namespace {

// Integers in the order of the floats they stand for; -0 is 0, NaN comes before -inf.
template <class A>
using Key = typename IntOf<A>::type;

template <class A>
MK_INLINE Lane<A> keys_of(Vec<A> x) {
  constexpr int kBits = 8 * sizeof(A);
  const Lane<A> nan = x != x;
  const Lane<A> bits = bit_cast<Lane<A>>(x + A(0));
  const Key<A> magnitude = static_cast<Key<A>>(~(Key<A>{1} << (kBits - 1)));
  const Key<A> lowest = static_cast<Key<A>>(Key<A>{1} << (kBits - 1));
  return nan ? Lane<A>{} + lowest : bits ^ ((bits >> (kBits - 1)) & magnitude);
}

template <class A>
MK_INLINE Key<A> key_of(A x) {
  return keys_of<A>(splat(x))[0];
}

template <class A>
MK_INLINE A value_of(Key<A> key) {
  constexpr int kBits = 8 * sizeof(A);
  const Key<A> magnitude = static_cast<Key<A>>(~(Key<A>{1} << (kBits - 1)));
  return bit_cast<A>(static_cast<Key<A>>(key ^ ((key >> (kBits - 1)) & magnitude)));
}

// How many of n keys are at least `least`; n is a multiple of the lanes.
template <class A>
MK_INLINE int64_t count_reaching(const Key<A>* keys, int64_t n, Key<A> least) {
  constexpr int W = kLanes<A>;
  Lane<A> counts[2] = {};
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    counts[0] -= load(keys + i) >= least;
    counts[1] -= load(keys + i + W) >= least;
  }
  if (i < n) counts[0] -= load(keys + i) >= least;
  counts[0] += counts[1];
  int64_t total = 0;
  for (int lane = 0; lane < W; ++lane) total += counts[0][lane];
  return total;
}

// A key that at least k of n keys reach, and fewer than k exceed unless exactly k reach it; the
// keys are padded with the least integer to a multiple of the lanes. k <= n. A key that up to
// `enough` reach will do, and is found in fewer steps.
template <class A>
MK_INLINE Key<A> kth_largest(Key<A>* keys, int64_t n, int64_t k, int64_t enough = 0) {
  constexpr int W = kLanes<A>;
  const int64_t padded = round_up(n, W);
  for (int64_t i = n; i < padded; ++i) keys[i] = key_of<A>(static_cast<A>(__builtin_nan("")));
  Lane<A> least = load(keys), most = least;
  for (int64_t i = W; i < padded; i += W) {
    const Lane<A> x = load(keys + i);
    least = x < least ? x : least;
    most = x > most ? x : most;
  }
  Key<A> low = least[0], high = most[0];
  for (int lane = 1; lane < W; ++lane) {
    if (least[lane] < low) low = least[lane];
    if (most[lane] > high) high = most[lane];
  }
  while (low < high) {
    using Unsigned = __typeof__(sizeof(A) == 8 ? uint64_t{} : uint32_t{});
    const Unsigned span = static_cast<Unsigned>(high) - static_cast<Unsigned>(low);
    const Key<A> middle = static_cast<Key<A>>(static_cast<Unsigned>(low) + span / 2 + (span & 1));
    const int64_t count = count_reaching<A>(keys, padded, middle);
    if (count == k || (count > k && count <= enough)) return middle;
    if (count > k) {
      low = middle;
    } else {
      high = static_cast<Key<A>>(middle - 1);
    }
  }
  return low;
}

}  // namespace
}  // namespace memkernels::selection
