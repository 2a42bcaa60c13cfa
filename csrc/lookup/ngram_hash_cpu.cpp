// rows[h] = mix mod m_h + offset_h, mix = xor over j < n of id[t - j] * multiplier_j, in wrapping
// int64: with four lanes some four instructions a head, where a division takes 20 to 40 cycles.
//
// q = round(mix * (1 / m)) in float64 has four relative errors of 2^-53, so that it is off mix / m
// by at most 1/2 + 4 * 2^-53 * 2^63 / m, less than 1 from m = 2^14 on. mix - q * m then lies
// between -m and m, fits into int64 for every m, and comes out right however q * m wraps. |q| is at
// most 2^49, an integer that a float64 shows in its low bits after 1.5 * 2^52 is added. A smaller m
// has a multiple between 2^14 and 2^15: mix is first reduced by that one. Below m = 2^31, as tables
// have it, the low words of q * m are enough.
#include "core/cpu/simd.h"
#include "lookup/ngram_hash.h"

namespace memkernels::lookup {
namespace {

using VecI64 = Vec<int64_t>;
using VecU64 = Vec<uint64_t>;

constexpr uint64_t kSmall = 1 << 14;
constexpr uint64_t kWide = uint64_t{1} << 31;
constexpr double kMagic = 0x1.8p52;

void set_head(HashHeads& group, int head, int64_t modulus, int64_t offset) {
  const uint64_t m = static_cast<uint64_t>(modulus);
  uint64_t multiple = m;
  while (multiple < kSmall) multiple *= 2;
  const bool small = multiple != m, wide = m >= kWide;
  group.multiple[head] = multiple;
  group.multiple_inverse[head] = 1 / static_cast<double>(multiple);
  group.modulus[head] = m;
  group.modulus_inverse[head] = small ? 1 / static_cast<double>(m) : 0;  // 0: nothing happens
  group.offset[head] = static_cast<uint64_t>(offset);
  group.small |= small;
  group.wide |= wide;
}

// x mod m + offset, for signed x, whose nearest float64 is x_float.
MK_INLINE VecU64 remainder(VecU64 x, Vec<double> x_float, VecU64 m, Vec<double> inverse,
                           VecU64 offset) {
  const VecU64 q = bit_cast<VecU64>(x_float * inverse + kMagic) - bit_cast<uint64_t>(kMagic);
  const VecU64 r = x - q * m;
  return r + (bit_cast<VecI64>(r) < 0 ? offset + m : offset);
}

// The same of m between kSmall and kWide.
MK_INLINE VecU64 narrow_remainder(VecU64 x, Vec<double> x_float, VecU64 m, Vec<double> inverse,
                                  VecU64 offset) {
  const VecU32 q = bit_cast<VecU32>(x_float * inverse + kMagic);
  VecU32 r = bit_cast<VecU32>(x) - q * bit_cast<VecU32>(m);
  r += bit_cast<VecI32>(r) < 0 ? bit_cast<VecU32>(m) : VecU32{};
  return (bit_cast<VecU64>(r) & 0xffffffff) + offset;
}

// The bits of x below 2 * kSmall as a number.
MK_INLINE Vec<double> low_to_float(VecU64 x) {
  const VecU64 low = x & (2 * kSmall - 1);
  return bit_cast<Vec<double>>(low + bit_cast<uint64_t>(kMagic)) - kMagic;
}

// grams[n - 1] of the n-grams that end at ids[0, num_tokens), for each n.
void mix(const NgramHashJob& job, const int64_t* ids, int num_tokens, HashGrams* grams) {
  const VecI64 eos = splat(job.eos_id);
  for (int t = 0; t < num_tokens; t += kLanes<int64_t>) {
    VecU64 mixed{};
    VecI64 blocked{}, hidden{};  // -1: yes
    for (int64_t j = 0; j < job.longest; ++j) {
      const VecI64 id = hidden ? eos : load(ids + t - j);
      mixed ^= bit_cast<VecU64>(id) * static_cast<uint64_t>(job.multipliers[j]);
      blocked |= id < 0;
      if (j > 0) hidden |= id == eos;
      store(grams[j].mix + t, mixed);
      store(grams[j].blocked + t, blocked);
    }
  }
}

enum class Moduli { narrow, any, some_small };

template <Moduli kModuli>
void reduce(const HashHeads& group, const HashGrams& grams, int num_tokens, int64_t width,
            int64_t* rows) {
  constexpr int W = kLanes<uint64_t>, N = HashHeads::kHeads / W;
  const bool whole = group.count == HashHeads::kHeads;
  VecU64 multiple[N], modulus[N], offset[N];  // in registers, as far as they go
  Vec<double> multiple_inverse[N], modulus_inverse[N];
  for (int i = 0; i < N; ++i) {
    multiple[i] = load(group.multiple + i * W);
    multiple_inverse[i] = load(group.multiple_inverse + i * W);
    modulus[i] = load(group.modulus + i * W);
    modulus_inverse[i] = load(group.modulus_inverse + i * W);
    offset[i] = load(group.offset + i * W);
  }
  for (int t = 0; t < num_tokens; ++t, rows += width) {
    const VecU64 x = splat(grams.mix[t]);
    const Vec<double> x_float = splat(static_cast<double>(static_cast<int64_t>(grams.mix[t])));
    int64_t part[HashHeads::kHeads];
    int64_t* const to = whole ? rows : part;
    for (int i = 0; i < N; ++i) {
      VecU64 r;
      if constexpr (kModuli == Moduli::narrow) {
        r = narrow_remainder(x, x_float, multiple[i], multiple_inverse[i], offset[i]);
      } else if constexpr (kModuli == Moduli::any) {
        r = remainder(x, x_float, multiple[i], multiple_inverse[i], offset[i]);
      } else {
        r = remainder(x, x_float, multiple[i], multiple_inverse[i], VecU64{});
        r = remainder(r, low_to_float(r), modulus[i], modulus_inverse[i], offset[i]);
      }
      store(to + i * W, bit_cast<VecI64>(r) | splat(grams.blocked[t]));
    }
    for (int64_t h = 0; !whole && h < group.count; ++h) rows[h] = part[h];
  }
}

void run(const NgramHashJob& job, const int64_t* ids, int64_t num_tokens, HashGrams* grams,
         int64_t* rows) {
  while (num_tokens > 0) {
    const int tokens = num_tokens < HashGrams::kTokens ? num_tokens : HashGrams::kTokens;
    mix(job, ids, tokens, grams);
    int64_t* to = rows;
    for (int64_t g = 0; g < job.num_groups; ++g) {
      const HashHeads& group = job.groups[g];
      const auto reduce_group = group.small  ? reduce<Moduli::some_small>
                                : group.wide ? reduce<Moduli::any>
                                             : reduce<Moduli::narrow>;
      reduce_group(group, grams[group.order - 1], tokens, job.width, to);
      to += group.count;
    }
    ids += tokens;
    rows += tokens * job.width;
    num_tokens -= tokens;
  }
}

}  // namespace

namespace cpu::MEMKERNELS_ISA {

NgramHashKernel ngram_hash_kernel() { return {set_head, run}; }

}  // namespace cpu::MEMKERNELS_ISA
}  // namespace memkernels::lookup
