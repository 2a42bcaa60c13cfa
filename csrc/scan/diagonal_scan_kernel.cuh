// h[t] = a[t] h[t - 1] + x[t]. A warp takes parts of 32 tokens: it sums up what each makes of the
// carry that comes into it, A carry + B, and, when that carry is known, goes through the tokens
// once more as they follow one another; so no product is longer than a part. Carries go from part
// to part in order, whoever computes them: the warps of a block, for a tile of neighbouring parts
// after another, or, of few sequences, a kernel of its own between two that take all parts at once.
// No bit depends on which.
//
// Backward: dx[t] = dh[t] + k[t], with k[t - 1] = conj(a[t]) dx[t] as the carry; da[t] = dx[t]
// conj(h[t - 1]), from h as it was rounded. A da of all tokens is summed by parts, and then over
// them by another kernel.
//
// A reset cuts off all before it. Powers of two of A are counted apart, as a product of decays may
// leave the range of float32 where the recurrence does not: so A is 0 or infinite only by a decay
// that is.
//
// Cost of an element in bfloat16: x and a read, h written once, 6 bytes, backward 10; between two
// kernels x and a, of a backward dh and a, are read twice. Some 24 and 39 instructions of the 43
// and 71 that an H200 issues meanwhile, 25 more in parts with a decay of 0: bound by memory, but
// there.
#pragma once

#include "core/cuda/chunk.cuh"
#include "scan/diagonal_scan_cuda.h"

namespace memkernels::scan::cuda {

// Two real numbers, or a complex one. Every multiply-add is written as such: kernels must agree.
template <bool kComplex>
struct Numbers {
  // a * b + c
  __device__ __forceinline__ static void multiply_add(const float (&a)[2], const float (&b)[2],
                                                      const float (&c)[2], float (&to)[2]) {
    if constexpr (kComplex) {
      const float real = fmaf(a[0], b[0], fmaf(-a[1], b[1], c[0]));
      to[1] = fmaf(a[0], b[1], fmaf(a[1], b[0], c[1]));
      to[0] = real;
    } else {
      to[0] = fmaf(a[0], b[0], c[0]);
      to[1] = fmaf(a[1], b[1], c[1]);
    }
  }
  // a * b
  __device__ __forceinline__ static void multiply(const float (&a)[2], const float (&b)[2],
                                                  float (&to)[2]) {
    if constexpr (kComplex) {
      const float real = fmaf(a[0], b[0], -a[1] * b[1]);
      to[1] = fmaf(a[0], b[1], a[1] * b[0]);
      to[0] = real;
    } else {
      to[0] = a[0] * b[0];
      to[1] = a[1] * b[1];
    }
  }
  __device__ __forceinline__ static void conjugate(float (&x)[2]) {
    if constexpr (kComplex) x[1] = -x[1];
  }

  // Takes powers of two out of normal numbers and counts them: magnitudes, of a complex number that
  // of the larger part, become 2 to 4. Returns less than kNormal if one is not normal.
  static constexpr unsigned kNormal = 2u << 24;
  __device__ __forceinline__ static unsigned split(float (&a)[2], int (&exponents)[2]) {
    const uint32_t bits[2] = {float_to_bits(a[0]), float_to_bits(a[1])};
    uint32_t places[2] = {bits[0] << 1, bits[1] << 1};
    if constexpr (kComplex) {
      places[0] = places[0] > places[1] ? places[0] : places[1];
      const float factor = bits_to_float(0x7f800000u - (places[0] >> 1 & 0x7f800000u));
      a[0] *= factor, a[1] *= factor;
    } else {
      a[0] = bits_to_float((bits[0] & 0x807fffffu) | 0x40000000u);
      a[1] = bits_to_float((bits[1] & 0x807fffffu) | 0x40000000u);
    }
    unsigned least = ~0u;
#pragma unroll
    for (int e = 0; e < (kComplex ? 1 : 2); ++e) {
      const unsigned place = places[e] + (1u << 24);  // behind 0 and denormals, infinity and NaN
      exponents[e] += static_cast<int>(place >> 24) - 129;
      least = place < least ? place : least;
    }
    return least;
  }
  // Of any numbers; 0 and what is not finite stay, and count nothing.
  __device__ __forceinline__ static void split_any(float (&a)[2], int (&exponents)[2]) {
    constexpr int kParts = kComplex ? 2 : 1;
#pragma unroll
    for (int n = 0; n < 2 / kParts; ++n) {
      float* const parts = a + n;
      float size = fabsf(parts[0]);
      if constexpr (kComplex) size = fmaxf(size, fabsf(parts[1]));
      if (!(size > 0.f && size < kInfinity)) {
        exponents[n] = 0;
        continue;
      }
      if (size < 0x1p-100f) {
#pragma unroll
        for (int e = 0; e < kParts; ++e) parts[e] *= 0x1p100f;
        size *= 0x1p100f;
        exponents[n] -= 100;
      }
      const int exponent = static_cast<int>(float_to_bits(size) >> 23);
#pragma unroll
      for (int e = 0; e < kParts; ++e) parts[e] *= power_of_two(128 - exponent);
      exponents[n] += exponent - 128;
    }
  }
  // 2^e, of -126 to 127.
  __device__ __forceinline__ static float power_of_two(int e) {
    return bits_to_float(static_cast<uint32_t>(e + 127) << 23);
  }

  // The A of a product of split numbers and what they count.
  __device__ __forceinline__ static void join(float (&a)[2], int (&exponents)[2], Summary& s) {
    split_any(a, exponents);
    if constexpr (kComplex) exponents[1] = exponents[0];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      constexpr int kMost = 3 * 126;  // more than from the least number to the greatest
      int exponent = exponents[e] > kMost ? kMost : exponents[e];
      if (exponent < -kMost) exponent = -kMost;
      const int third = (exponent + kMost) / 3 - kMost / 3;
      s.a[e] = a[e] * power_of_two(exponent - 3 * third);
      s.scale[e] = power_of_two(third);
    }
  }

  // What a part lets out of a carry. It is scaled in steps towards what comes out, and A is not
  // less than 1: so none leaves the range of float32 where that does not.
  __device__ __forceinline__ static void pass(float (&carry)[2], const Summary& s, bool cut) {
    float next[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) next[e] = carry[e] * s.scale[e] * s.scale[e] * s.scale[e];
    multiply_add(s.a, next, s.b, next);
    carry[0] = cut ? s.b[0] : next[0];
    carry[1] = cut ? s.b[1] : next[1];
  }
};

// A lane's two columns of a sequence. Places in shared memory are numbers of elements: so the
// compiler sees what memory they are in.
template <class T, bool kComplex, bool kBackward>
struct DiagonalLane {
  using N = Numbers<kComplex>;
  static constexpr int kTile = kPartTokens * kGroupColumns;  // elements of a part

  const DiagonalParams& p;
  int64_t sequence, length, parts;
  Span span;
  int first, column;  // of the group, of the lane
  int constant;       // [kGroupColumns]: the a of all tokens, of which this lane uses its own

  __device__ __forceinline__ DiagonalLane(const DiagonalParams& p, int64_t sequence,
                                          const Span& span, int group, int constant)
      : p(p), sequence(sequence), length(span.end - span.begin), span(span), constant(constant) {
    parts = (length + kPartTokens - 1) / kPartTokens;
    first = group * kGroupColumns;
    column = first + threadIdx.x % 32 * 2;
#pragma unroll
    for (int e = 0; e < 2 && p.constant; ++e) {
      if (column + e < p.columns)
        *shared(constant + column - first + e) = static_cast<const T*>(p.a)[column + e];
    }
  }

  __device__ __forceinline__ static T* shared(int place) {
    return reinterpret_cast<T*>(shared_memory()) + place;
  }

  __device__ __forceinline__ int tokens_of(int64_t part) const {
    return static_cast<int>(clamp(length - part * kPartTokens, 0, kPartTokens));
  }

  // Of [N, columns].
  __device__ __forceinline__ void read(const float* from, int64_t stride, float (&x)[2]) const {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      x[e] = from && column + e < p.columns ? from[sequence * stride + column + e] : 0.f;
    }
  }
  __device__ __forceinline__ void write_end(const float (&x)[2]) const {
    if (!p.end) return;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (column + e < p.columns) p.end[sequence * p.columns + column + e] = x[e];
    }
  }

  // Of [B, T, columns].
  __device__ __forceinline__ T* row_of(void* data, int64_t token) const {
    const int64_t row = span.batch * p.parts.sequences.tokens + span.begin + token;
    return static_cast<T*>(data) + row * p.columns + column;
  }
  template <bool kPairs>
  __device__ __forceinline__ void write(T* to, const float (&x)[2]) const {
    if constexpr (kPairs) {
      if (column < p.columns) store_pair(to, x[0], x[1]);
    } else {
      if (column < p.columns) narrow(x[0], to[0]);
      if (column + 1 < p.columns) narrow(x[1], to[1]);
    }
  }

  // Starts copying rows of the group's columns.
  __device__ __forceinline__ void copy_rows(int place, const void* data,
                                            const int64_t (&strides)[2], int64_t token,
                                            int rows) const {
    constexpr int kChunk = 16 / sizeof(T), kChunks = kGroupColumns / kChunk;
    const T* from = static_cast<const T*>(data) + span.batch * strides[0] +
                    (span.begin + token) * strides[1] + first;
    T* to = shared(place);
    const int lane = threadIdx.x % 32, width = p.columns - first;
    if (p.aligned) {
      const int c = lane % kChunks * kChunk;
      from += lane / kChunks * strides[1] + c;
      to += lane / kChunks * kGroupColumns + c;
#pragma unroll 4
      for (int row = lane / kChunks; row < rows && c < width; row += 32 / kChunks) {
        copy_async_16(to, from);
        from += 32 / kChunks * strides[1];
        to += 32 / kChunks * kGroupColumns;
      }
    } else {
      for (int row = 0; row < rows; ++row) {
        for (int c = lane; c < kGroupColumns && c < width; c += 32) {
          to[row * kGroupColumns + c] = from[row * strides[1] + c];
        }
      }
    }
  }
  // Of x, a and h; h of each token's the token before. Returns whether this lane's token resets.
  __device__ __forceinline__ bool copy(int stage, int64_t part) const {
    const int64_t token = part * kPartTokens;
    const int count = tokens_of(part), lane = threadIdx.x % 32;
    copy_rows(stage, p.x, p.x_strides, token, count);
    if (!p.constant) copy_rows(stage + kTile, p.a, p.a_strides, token, count);
    if (p.h) {
      const int none = token == 0;
      copy_rows(before(stage) + none * kGroupColumns, p.h, p.h_strides, token + none - 1,
                count - none);
    }
    return p.reset && lane < count &&
           p.reset[span.batch * p.reset_strides[0] +
                   (span.begin + token + lane) * p.reset_strides[1]];
  }
  __device__ __forceinline__ int before(int stage) const {
    return stage + (p.constant ? kTile : 2 * kTile);
  }

  // This lane's columns of rows.
  struct Rows {
    int first, pitch;

    __device__ __forceinline__ void operator()(int token, float (&x)[2]) const {
      load(shared(first + token * pitch), x);
    }
  };
  __device__ __forceinline__ Rows rows(int tile) const {
    return {tile + column - first, kGroupColumns};
  }
  __device__ __forceinline__ Rows decays(int stage) const {
    return {(p.constant ? constant : stage + kTile) + column - first,
            p.constant ? 0 : kGroupColumns};
  }

  // resets: a bit for each token of the part.
  __device__ __forceinline__ Summary sum_up(int stage, int count, unsigned resets) const {
    const Rows xs = rows(stage), as = decays(stage);
    Summary s{};
    float product[2] = {1.f, kComplex ? 0.f : 1.f};
    int exponents[2] = {};
    unsigned least = ~0u;
    const auto token = [&](int i, bool begins) {
      float a[2], x[2];
      as(i, a);
      xs(i, x);
      if constexpr (kBackward) N::conjugate(a);
      if (begins) {
        s.b[0] = x[0], s.b[1] = x[1];
        if constexpr (kBackward) N::multiply(a, x, s.b);
      } else if constexpr (kBackward) {
        s.b[0] += x[0], s.b[1] += x[1];
        N::multiply(a, s.b, s.b);
      } else {
        N::multiply_add(a, s.b, x, s.b);
      }
      const unsigned place = N::split(a, exponents);
      least = place < least ? place : least;
      N::multiply(a, product, product);
    };
    if constexpr (kBackward) {
      const int last = (resets ? lowest(resets) : count) - 1;
      if (last >= 0) token(last, true);
#pragma unroll 4
      for (int i = last - 1; i >= 0; --i) token(i, false);
    } else {
      const int begin = resets ? highest(resets) : 0;
      token(begin, resets == 0);
#pragma unroll 4
      for (int i = begin + 1; i < count; ++i) token(i, false);
    }
    if (least < N::kNormal && !resets) {
      product[0] = 1.f, product[1] = kComplex ? 0.f : 1.f;
      exponents[0] = exponents[1] = 0;
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        float a[2];
        as(kBackward ? count - 1 - i : i, a);
        if constexpr (kBackward) N::conjugate(a);
        N::split_any(a, exponents);
        N::multiply(a, product, product);
      }
    }
    N::join(product, exponents, s);
    return s;
  }

  // Goes through the tokens of a part; carry: what comes into it, and what goes out.
  __device__ __forceinline__ void apply(int stage, int64_t part, unsigned resets,
                                        float (&carry)[2]) const {
    const int64_t token = part * kPartTokens;
    if (kComplex || p.columns % 2 == 0) {
      kBackward ? go_back<true>(stage, token, resets, carry)
                : go_on<true>(stage, token, resets, carry);
    } else {
      kBackward ? go_back<false>(stage, token, resets, carry)
                : go_on<false>(stage, token, resets, carry);
    }
  }

  template <bool kPairs>
  __device__ __forceinline__ void go_on(int stage, int64_t token, unsigned resets,
                                        float (&carry)[2]) const {
    const int count = tokens_of(token / kPartTokens);
    const Rows xs = rows(stage), as = decays(stage);
    T* to = row_of(p.out, token);
    for (int i = 0;; resets &= resets - 1) {
      const int stop = resets ? lowest(resets) : count;
#pragma unroll 4
      for (; i < stop; ++i) {
        float x[2], a[2];
        xs(i, x);
        as(i, a);
        N::multiply_add(a, carry, x, carry);
        write<kPairs>(to, carry);
        to += p.columns;
      }
      if (!resets) return;
      carry[0] = carry[1] = 0.f;
    }
  }

  template <bool kPairs>
  __device__ __forceinline__ void go_back(int stage, int64_t token, unsigned resets,
                                          float (&carry)[2]) const {
    const int count = tokens_of(token / kPartTokens);
    const Rows xs = rows(stage), as = decays(stage), pasts = rows(before(stage));
    T *dx = row_of(p.out, token + count), *da = row_of(p.da, token + count);
    float sums[2] = {}, initial[2] = {};
    if (p.h && token == 0) read(p.initial, p.initial_stride, initial);
    const auto step = [&](int i, bool resets_here) {
      float grad[2], a[2], past[2] = {};
      xs(i, grad);
      grad[0] += carry[0], grad[1] += carry[1];
      as(i, a);
      N::conjugate(a);
      N::multiply(a, grad, carry);
      dx -= p.columns;
      da -= p.columns;
      if (p.out) write<kPairs>(dx, grad);
      if (!p.h) return;
      if (!resets_here) pasts(i, past);
      if (!resets_here && token + i == 0) past[0] = initial[0], past[1] = initial[1];
      N::conjugate(past);
      if (p.constant) {
        N::multiply_add(past, grad, sums, sums);
      } else {
        N::multiply(past, grad, past);
        write<kPairs>(da, past);
      }
    };
    for (int i = count - 1;; --i) {
      const int stop = resets ? highest(resets) : -1;
#pragma unroll 4
      for (; i > stop; --i) step(i, false);
      if (i < 0) break;
      step(i, true);
      carry[0] = carry[1] = 0.f;
      resets ^= 1u << i;
    }
    if (!p.sums) return;
    float* const to =
        p.sums + (first_part(p.parts, sequence, span) + token / kPartTokens) * p.columns + column;
    if (column < p.columns) to[0] = sums[0];
    if (column + 1 < p.columns) to[1] = sums[1];
  }

  __device__ __forceinline__ static int highest(unsigned x) {
    return 31 - __clz(static_cast<int>(x));
  }
  __device__ __forceinline__ static int lowest(unsigned x) { return __popc((x & (0 - x)) - 1); }
};

template <class T, bool kComplex, bool kBackward>
__global__ void __launch_bounds__(32 * kDiagonalWarps, 2) diagonal_scan(const DiagonalParams p) {
  using Lane = DiagonalLane<T, kComplex, kBackward>;
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = static_cast<int>(blockIdx.x % p.groups);
  const int64_t block = blockIdx.x / p.groups;
  const int tensors = 1 + !p.constant + (p.h != nullptr);
  // Of each warp a row, then its stages; at last what the warps tell one another.
  const int constant = warp * kGroupColumns, stages = warps * kGroupColumns;

  if (p.work != DiagonalWork::all) {
    const Part tile = part_at(p.tiles, block);
    const Lane columns(p, tile.sequence, tile.span, group, constant);
    const int64_t part = tile.begin / kPartTokens + warp;
    const int64_t last = kBackward ? 0 : columns.parts - 1;  // whose carry out is the end
    if (part >= columns.parts || (part == last && p.work == DiagonalWork::sum_up)) return;
    const int stage = stages + warp * tensors * Lane::kTile;
    const bool reset = columns.copy(stage, part);
    const unsigned resets = __ballot_sync(kWholeWarp, reset);
    commit_copies();
    wait_copies<0>();
    __syncwarp();
    const int64_t number = first_part(p.parts, tile.sequence, tile.span) + part;
    Summary& summary = p.summaries[number * p.groups * 32 + group * 32 + lane];
    if (p.work == DiagonalWork::sum_up) {
      summary = columns.sum_up(stage, columns.tokens_of(part), resets);
      if (group == 0 && lane == 0) p.cuts[number] = resets != 0;
    } else {
      float carry[2] = {summary.b[0], summary.b[1]};
      columns.apply(stage, part, resets, carry);
      if (part == last) columns.write_end(carry);
    }
    return;
  }

  // Parts in the order of the carry.
  const Lane columns(p, block, span_of(p.parts.sequences, block), group, constant);
  const auto part_of = [&](int64_t i) { return kBackward ? columns.parts - 1 - i : i; };
  const int first_stage = stages + warp * 2 * tensors * Lane::kTile;
  const auto summaries = reinterpret_cast<Summary*>(
      Lane::shared(stages + warps * 2 * tensors * Lane::kTile));         // [2, warps, lanes]
  const auto cuts = reinterpret_cast<int*>(summaries + 2 * warps * 32);  // [2, kDiagonalWarps]
  float carry[2];
  columns.read(p.start, p.start_stride, carry);
  if (columns.parts == 0 && warp == 0) columns.write_end(carry);
  bool reset = false;
  if (warp < columns.parts) reset = columns.copy(first_stage, part_of(warp));
  commit_copies();
  int turn = 0;
  for (int64_t begin = 0; begin < columns.parts; begin += warps, turn ^= 1) {
    const int64_t i = begin + warp, next = i + warps;
    const bool more = begin + warps < columns.parts;
    const unsigned resets = __ballot_sync(kWholeWarp, reset);
    if (next < columns.parts) {
      reset = columns.copy(first_stage + (turn ^ 1) * tensors * Lane::kTile, part_of(next));
    }
    commit_copies();
    wait_copies<1>();
    __syncwarp();
    const int stage = first_stage + turn * tensors * Lane::kTile;
    Summary* const tile = summaries + turn * warps * 32;
    int* const tile_cuts = cuts + turn * kDiagonalWarps;
    if (i + 1 < columns.parts) {
      tile[warp * 32 + lane] = columns.sum_up(stage, columns.tokens_of(part_of(i)), resets);
      if (lane == 0) tile_cuts[warp] = resets != 0;
    }
    __syncthreads();
    float mine[2] = {};
    for (int w = 0; w < warps; ++w) {
      if (w == warp) mine[0] = carry[0], mine[1] = carry[1];
      if (more || w < warp) Lane::N::pass(carry, tile[w * 32 + lane], tile_cuts[w]);
    }
    if (i < columns.parts) {
      columns.apply(stage, part_of(i), resets, mine);
      if (i + 1 == columns.parts) columns.write_end(mine);
    }
    __syncwarp();  // the stage is free
  }
}

// Makes carries of what parts sum up: a thread has a lane's columns of a sequence.
template <bool kComplex>
__global__ void __launch_bounds__(32 * kDiagonalWarps)
    pass_carries(const DiagonalParams p, bool backward) {
  constexpr int kAhead = 8;
  const int64_t i = int64_t{blockIdx.x} * 32 * kDiagonalWarps + threadIdx.x;
  const int lanes = p.groups * 32, lane = static_cast<int>(i % lanes), column = 2 * lane;
  const int64_t n = i / lanes;
  if (n >= p.parts.sequences.count) return;
  const Span span = span_of(p.parts.sequences, n);
  const int64_t parts = (span.end - span.begin + kPartTokens - 1) / kPartTokens;
  const int64_t first = first_part(p.parts, n, span);
  float carry[2];
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const bool given = p.start && column + e < p.columns;
    carry[e] = given ? p.start[n * p.start_stride + column + e] : 0.f;
    if (parts == 0 && p.end && column + e < p.columns) p.end[n * p.columns + column + e] = carry[e];
  }
  for (int64_t done = 0; done < parts; done += kAhead) {
    Summary summaries[kAhead];
    bool cuts[kAhead];
    const auto number = [&](int ahead) {
      return first + (backward ? parts - 1 - done - ahead : done + ahead);
    };
#pragma unroll
    for (int ahead = 0; ahead < kAhead; ++ahead) {
      if (done + ahead + 1 >= parts) break;  // nothing follows the last
      summaries[ahead] = p.summaries[number(ahead) * lanes + lane];
      cuts[ahead] = p.cuts[number(ahead)];
    }
#pragma unroll
    for (int ahead = 0; ahead < kAhead; ++ahead) {
      if (done + ahead >= parts) break;
      Summary& to = p.summaries[number(ahead) * lanes + lane];
      to.b[0] = carry[0], to.b[1] = carry[1];
      if (done + ahead + 1 < parts) {
        Numbers<kComplex>::pass(carry, summaries[ahead], cuts[ahead]);
      }
    }
  }
}

// Totals over the parts of a sequence; a lane has a column, and a warp kSumParts at a time.
static __global__ void __launch_bounds__(32 * kSumWarps) sum_parts(const DiagonalSumParams p) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t n = blockIdx.x / p.groups;
  const int column = static_cast<int>(blockIdx.x % p.groups) * 32 + lane;
  const Span span = span_of(p.parts.sequences, n);
  const int64_t parts = (span.end - span.begin + kPartTokens - 1) / kPartTokens;
  const float* const sums = p.sums + first_part(p.parts, n, span) * p.columns + column;
  const auto all = reinterpret_cast<float*>(shared_memory());  // [warps, lanes]
  float total = 0.f;
  for (int64_t begin = 0; begin < parts; begin += kSumWarps * kSumParts) {
    const int64_t first = begin + warp * kSumParts, last = clamp(first + kSumParts, 0, parts);
    float sum = 0.f;
    if (column < p.columns) {
#pragma unroll 8
      for (int64_t part = first; part < last; ++part) sum += sums[part * p.columns];
    }
    all[threadIdx.x] = sum;
    __syncthreads();
    for (int w = 0; w < kSumWarps && warp == 0; ++w) total += all[w * 32 + lane];
    __syncthreads();
  }
  if (warp == 0 && column < p.columns) p.totals[n * p.columns + column] = total;
}

}  // namespace memkernels::scan::cuda
