// Vectors of the instruction set a file is compiled for, on GCC/Clang vector extensions.
//
// Files that include this are compiled several times with different flags. Everything here has
// internal linkage: an inline function shared between them would be merged by the linker, and
// an AVX-512 body could end up serving an older CPU. So: no std containers, no exceptions.
//
// Pair order. A row of 2W elements is loaded as two vectors of W, by load_pair. For bfloat16
// these hold the even and the odd elements, because a bfloat16 becomes a float by one shift or
// one mask of the 32-bit word it lies in; other types keep their order. Dot products do not care
// about the order of the head dimension, and store_pair undoes it, so nothing is ever shuffled.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "core/prefetch.h"

#define MK_INLINE inline __attribute__((always_inline))

namespace memkernels {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kRegisters = 16;
#else
constexpr int kVectorBytes = 16;
constexpr int kRegisters = 16;
#endif

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class A>
struct VecOf {
  typedef A type __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using Vec = typename VecOf<A>::type;
using VecI32 = Vec<int32_t>;
using VecU32 = Vec<uint32_t>;
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));

template <class A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

// The type in which elements of T are accumulated.
template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using Acc = typename AccOf<T>::type;

// Elements in a pair of vectors: the unit in which rows are padded.
template <class T>
constexpr int kPair = 2 * kLanes<Acc<T>>;

// A number as a type, for functions with a loop to unroll.
template <int N>
struct Int {
  static constexpr int value = N;
};

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <class To, class From>
MK_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

template <class A>
MK_INLINE Vec<A> load(const A* p) {
  Vec<A> v;
  memcpy(&v, p, sizeof(v));
  return v;
}

template <class A>
MK_INLINE void store(A* p, Vec<A> v) {
  memcpy(p, &v, sizeof(v));
}

template <class A>
MK_INLINE Vec<A> splat(A x) {
  return x - Vec<A>{};  // not +: that would lose the sign of zero, and cost an instruction
}

template <class A>
constexpr A kInfinity = static_cast<A>(__builtin_inf());

template <class V>
MK_INLINE V vmax(V a, V b) {
  return a > b ? a : b;
}

// ---- scalar conversions ------------------------------------------------------------------------

MK_INLINE VecU32 bf16_round(Vec<float> v) {  // the rounded bits lie in the upper half
  const VecU32 f = bit_cast<VecU32>(v);
  const VecU32 rounded = f + 0x7fff + ((f >> 16) & 1);
  return v == v ? rounded : f | 0x400000u;
}

MK_INLINE float half_to_float(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t magnitude = h & 0x7fff;
  if (magnitude >= 0x7c00) return bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ff) << 13);
  // Scaling by 2^112 rebiases the exponent and normalises subnormals, exactly.
  const float scaled = bit_cast<float>(magnitude << 13) * 0x1p112f;
  return bit_cast<float>(sign | bit_cast<uint32_t>(scaled));
#endif
}

MK_INLINE uint16_t float_to_half(float x) {
#if defined(__F16C__)
  return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00;
  if (magnitude >= 0x47800000u) return sign | 0x7c00;  // 65536 and above
  if (magnitude < 0x38800000u) {                       // subnormal: let the adder round
    const float shifted = bit_cast<float>(magnitude) + 0.5f;
    return sign | static_cast<uint16_t>(bit_cast<uint32_t>(shifted) - 0x3f000000u);
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000u;
  return sign | static_cast<uint16_t>(rounded >> 13);  // 65520 and above carry into infinity
#endif
}

MK_INLINE double to_acc(double x) { return x; }
MK_INLINE float to_acc(float x) { return x; }
MK_INLINE float to_acc(bf16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
MK_INLINE float to_acc(f16 x) { return half_to_float(x.bits); }

template <class T>
MK_INLINE T from_acc(Acc<T> x) {
  if constexpr (sizeof(T) == 2) {
    T out;
    if constexpr (__is_same(T, bf16)) {
      out.bits = static_cast<uint16_t>(bf16_round(splat(x))[0] >> 16);
    } else {
      out.bits = float_to_half(x);
    }
    return out;
  } else {
    return x;
  }
}

// A vector of consecutive elements, in their order.
template <class T>
MK_INLINE Vec<Acc<T>> load_ordered(const T* p) {
  if constexpr (__is_same(T, bf16)) {
    Halves bits;
    memcpy(&bits, p, sizeof(bits));
#if defined(__AVX512F__)  // GCC widens by halves
    const VecU32 words = bit_cast<VecU32>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(bits)));
#elif defined(__AVX2__)
    const VecU32 words = bit_cast<VecU32>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(bits)));
#else
    const VecU32 words = __builtin_convertvector(bits, VecU32);
#endif
    return bit_cast<Vec<float>>(words << 16);
  } else if constexpr (__is_same(T, f16)) {
#if defined(__AVX512F__)
    __m256i bits;
    memcpy(&bits, p, sizeof(bits));
    return bit_cast<Vec<float>>(_mm512_cvtph_ps(bits));
#elif defined(__F16C__)
    __m128i bits;
    memcpy(&bits, p, sizeof(bits));
    return bit_cast<Vec<float>>(_mm256_cvtph_ps(bits));
#else
    Vec<float> x{};
    for (int i = 0; i < kLanes<float>; ++i) x[i] = half_to_float(p[i].bits);
    return x;
#endif
  } else {
    return load(p);
  }
}

// The inverse of load_ordered.
template <class T>
MK_INLINE void store_ordered(T* p, Vec<Acc<T>> v) {
  if constexpr (__is_same(T, bf16)) {
    const Halves bits = __builtin_convertvector(bf16_round(v) >> 16, Halves);
    memcpy(p, &bits, sizeof(bits));
  } else if constexpr (__is_same(T, f16)) {
#if defined(__AVX512F__)
    const __m256i bits = _mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT);
    memcpy(p, &bits, sizeof(bits));
#elif defined(__F16C__)
    const __m128i bits = _mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT);
    memcpy(p, &bits, sizeof(bits));
#else
    for (int i = 0; i < kLanes<float>; ++i) p[i].bits = float_to_half(v[i]);
#endif
  } else {
    store(p, v);
  }
}

// ---- rows in pair order ------------------------------------------------------------------------

template <class T>
MK_INLINE void load_pair(const T* p, Vec<Acc<T>>& a, Vec<Acc<T>>& b) {
  constexpr int W = kLanes<Acc<T>>;
  if constexpr (__is_same(T, bf16)) {
    VecU32 words;
    memcpy(&words, p, sizeof(words));
    a = bit_cast<Vec<float>>(words << 16);
    b = bit_cast<Vec<float>>(words & 0xffff0000u);
  } else if constexpr (__is_same(T, f16)) {
#if defined(__AVX512F__)
    __m256i lo, hi;
    memcpy(&lo, p, sizeof(lo));
    memcpy(&hi, p + W, sizeof(hi));
    a = bit_cast<Vec<float>>(_mm512_cvtph_ps(lo));
    b = bit_cast<Vec<float>>(_mm512_cvtph_ps(hi));
#elif defined(__F16C__)
    __m128i lo, hi;
    memcpy(&lo, p, sizeof(lo));
    memcpy(&hi, p + W, sizeof(hi));
    a = bit_cast<Vec<float>>(_mm256_cvtph_ps(lo));
    b = bit_cast<Vec<float>>(_mm256_cvtph_ps(hi));
#else
    a = b = Vec<float>{};
    for (int i = 0; i < W; ++i) {
      a[i] = half_to_float(p[i].bits);
      b[i] = half_to_float(p[i + W].bits);
    }
#endif
  } else {
    a = load(p);
    b = load(p + W);
  }
}

template <class T>
MK_INLINE void store_pair(T* p, Vec<Acc<T>> a, Vec<Acc<T>> b) {
  constexpr int W = kLanes<Acc<T>>;
  if constexpr (__is_same(T, bf16)) {
    const VecU32 words = (bf16_round(a) >> 16) | (bf16_round(b) & 0xffff0000u);
    memcpy(p, &words, sizeof(words));
  } else if constexpr (__is_same(T, f16)) {
#if defined(__AVX512F__)
    const __m256i lo = _mm512_cvtps_ph(bit_cast<__m512>(a), _MM_FROUND_TO_NEAREST_INT);
    const __m256i hi = _mm512_cvtps_ph(bit_cast<__m512>(b), _MM_FROUND_TO_NEAREST_INT);
    memcpy(p, &lo, sizeof(lo));
    memcpy(p + W, &hi, sizeof(hi));
#elif defined(__F16C__)
    const __m128i lo = _mm256_cvtps_ph(bit_cast<__m256>(a), _MM_FROUND_TO_NEAREST_INT);
    const __m128i hi = _mm256_cvtps_ph(bit_cast<__m256>(b), _MM_FROUND_TO_NEAREST_INT);
    memcpy(p, &lo, sizeof(lo));
    memcpy(p + W, &hi, sizeof(hi));
#else
    for (int i = 0; i < W; ++i) {
      p[i].bits = float_to_half(a[i]);
      p[i + W].bits = float_to_half(b[i]);
    }
#endif
  } else {
    store(p, a);
    store(p + W, b);
  }
}

// The first n < kPair elements of a row that ends there; the rest read as zero.
template <class T>
MK_INLINE void load_pair_tail(const T* p, int64_t n, Vec<Acc<T>>& a, Vec<Acc<T>>& b) {
  T padded[kPair<T>] = {};
  for (int64_t i = 0; i < n; ++i) padded[i] = p[i];
  load_pair(padded, a, b);
}

template <class T>
MK_INLINE void store_pair_tail(T* p, int64_t n, Vec<Acc<T>> a, Vec<Acc<T>> b) {
  T padded[kPair<T>];
  store_pair(padded, a, b);
  for (int64_t i = 0; i < n; ++i) p[i] = padded[i];
}

// A row of `dim` elements, times `scale`, into round_up(dim, kPair) accumulators in pair order.
template <class T>
MK_INLINE void unpack_row(const T* row, int64_t dim, Acc<T> scale, Acc<T>* out) {
  constexpr int W = kLanes<Acc<T>>;
  int64_t d = 0;
  Vec<Acc<T>> a, b;
  for (; d + kPair<T> <= dim; d += kPair<T>) {
    load_pair(row + d, a, b);
    store(out + d, a * scale);
    store(out + d + W, b * scale);
  }
  if (d < dim) {
    load_pair_tail(row + d, dim - d, a, b);
    store(out + d, a * scale);
    store(out + d + W, b * scale);
  }
}

// The inverse: accumulators in pair order, times `scale`, to a row of `dim` elements.
template <class T>
MK_INLINE void pack_row(const Acc<T>* in, int64_t dim, Acc<T> scale, T* row) {
  constexpr int W = kLanes<Acc<T>>;
  int64_t d = 0;
  for (; d + kPair<T> <= dim; d += kPair<T>) {
    store_pair(row + d, load(in + d) * scale, load(in + d + W) * scale);
  }
  if (d < dim) {
    store_pair_tail(row + d, dim - d, load(in + d) * scale, load(in + d + W) * scale);
  }
}

// ---- shuffles and reductions -------------------------------------------------------------------

#if defined(__clang__)
#define MK_SHUFFLE(A, a, b, mask) shuffle_lanes<A>(a, b, mask)
template <class A, class M>
MK_INLINE Vec<A> shuffle_lanes(Vec<A> a, Vec<A> b, M mask) {
  Vec<A> out;
  for (int i = 0; i < kLanes<A>; ++i) {
    out[i] = mask[i] < kLanes<A> ? a[mask[i]] : b[mask[i] - kLanes<A>];
  }
  return out;
}
#else
#define MK_SHUFFLE(A, a, b, mask) __builtin_shuffle(a, b, mask)
#endif

template <class A>
constexpr int kLaneBits = __builtin_ctz(kLanes<A>);

template <class A>
struct IntOf {
  using type = int32_t;
};
template <>
struct IntOf<double> {
  using type = int64_t;
};
template <class A>
using Lane = Vec<typename IntOf<A>::type>;

// Bit i is set where lane i of a comparison holds.
template <class A>
MK_INLINE uint32_t lane_bits(Lane<A> holds) {
#if defined(__AVX512F__)
  static_assert(sizeof(A) == 4);
  return _mm512_movepi32_mask(bit_cast<__m512i>(holds));
#elif defined(__AVX2__)
  static_assert(sizeof(A) == 4);
  return _mm256_movemask_ps(bit_cast<__m256>(holds));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes<A>; ++i) bits |= static_cast<uint32_t>(holds[i] & 1) << i;
  return bits;
#endif
}

// For blocks of 2h lanes: the lower halves of a and b side by side, or the upper halves.
template <class A, int h>
MK_INLINE Vec<A> interleave(Vec<A> a, Vec<A> b, bool upper) {
  constexpr int W = kLanes<A>;
  Lane<A> lower_mask{}, upper_mask{};
  for (int i = 0; i < W; ++i) {
    const int source = i / (2 * h) * (2 * h) + i % h;
    const int from_b = i / h % 2 * W;
    lower_mask[i] = source + from_b;
    upper_mask[i] = source + h + from_b;
  }
  return upper ? MK_SHUFFLE(A, a, b, upper_mask) : MK_SHUFFLE(A, a, b, lower_mask);
}

// Lane i of the result is the sum of the lanes of v[i]. Destroys v.
template <class A, int h = kLanes<A> / 2>
MK_INLINE Vec<A> sum_each(Vec<A>* v) {
#pragma GCC unroll 16
  for (int i = 0; i < h; ++i) {
    v[i] = interleave<A, h>(v[i], v[i + h], false) + interleave<A, h>(v[i], v[i + h], true);
  }
  if constexpr (h > 1) {
    return sum_each<A, h / 2>(v);
  } else {
    return v[0];
  }
}

// Transposes the square of W vectors in place.
template <class A, int h = kLanes<A> / 2>
MK_INLINE void transpose(Vec<A>* v) {
  constexpr int W = kLanes<A>;
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    if (i / h % 2) continue;
    const Vec<A> a = v[i], b = v[i + h];
    v[i] = interleave<A, h>(a, b, false);
    v[i + h] = interleave<A, h>(a, b, true);
  }
  if constexpr (h > 1) transpose<A, h / 2>(v);
}

template <class A>
MK_INLINE A sum(Vec<A> v) {
  A lanes[kLanes<A>];
  store(lanes, v);
  for (int h = kLanes<A> / 2; h > 0; h /= 2) {
    for (int i = 0; i < h; ++i) lanes[i] += lanes[i + h];
  }
  return lanes[0];
}

template <class A>
MK_INLINE A max(Vec<A> v) {
  A lanes[kLanes<A>];
  store(lanes, v);
  for (int h = kLanes<A> / 2; h > 0; h /= 2) {
    for (int i = 0; i < h; ++i) lanes[i] = lanes[i] > lanes[i + h] ? lanes[i] : lanes[i + h];
  }
  return lanes[0];
}

// ---- elementary functions ----------------------------------------------------------------------

// e^x within 1.2 ulp for x up to 88.7; 0 below -87.3 (and for -inf, exactly); NaN stays NaN.
MK_INLINE Vec<float> exp(Vec<float> x) {
  const float magic = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  const Vec<float> shifted = x * 0x1.715476p0f + magic;
  const Vec<float> n = shifted - magic;
  Vec<float> r = x - n * 0x1.62e4p-1f;  // ln 2 in two parts; the first product is exact
  r = r - n * 0x1.7f7d1cp-20f;
  Vec<float> p = splat(0x1.6a23cep-10f);  // a minimax polynomial, within 3e-9 of e^r
  p = p * r + 0x1.123a2p-7f;
  p = p * r + 0x1.5558f2p-5f;
  p = p * r + 0x1.555492p-3f;
  p = p * r + 0x1.fffffcp-2f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Vec<float> y =
      bit_cast<Vec<float>>(bit_cast<VecI32>(p) + (bit_cast<VecI32>(shifted) << 23));
  const Vec<float> small = x < -87.3f ? Vec<float>{} : x;  // 0, or the NaN to keep
  return x >= -87.3f ? y : small;
}

MK_INLINE Vec<double> exp(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

// e^x where that may overflow.
MK_INLINE Vec<float> exp_or_inf(Vec<float> x) {
  return x > 88.722f ? splat(kInfinity<float>) : exp(x);
}
MK_INLINE Vec<double> exp_or_inf(Vec<double> x) { return exp(x); }

MK_INLINE float exp(float x) { return exp_or_inf(splat(x))[0]; }
MK_INLINE double exp(double x) { return __builtin_exp(x); }
MK_INLINE float log(float x) { return static_cast<float>(__builtin_log(static_cast<double>(x))); }
MK_INLINE double log(double x) { return __builtin_log(x); }

template <class A>
MK_INLINE Vec<A> sigmoid(Vec<A> x) {
  const Vec<A> e = exp(x < 0 ? x : -x);
  return (x < 0 ? e : splat(A(1))) / (1 + e);
}

// Odd polynomial near zero, where 1 - 2 / (e^2x + 1) would cancel.
MK_INLINE Vec<float> tanh(Vec<float> x) {
  const Vec<float> magnitude = x < 0.0f ? -x : x;
  const Vec<float> clamped = magnitude > 10.0f ? splat(10.0f) : magnitude;
  const Vec<float> far = 1.0f - 2.0f / (exp(clamped + clamped) + 1.0f);
  const Vec<float> x2 = x * x;
  Vec<float> p = splat(-0x1.75d1f4p-8f);
  p = p * x2 + 0x1.522178p-6f;
  p = p * x2 - 0x1.b83b2ep-5f;
  p = p * x2 + 0x1.110718p-3f;
  p = p * x2 - 0x1.555532p-2f;
  const Vec<float> near = x + x * x2 * p;
  return magnitude < 0.625f ? near : (x < 0.0f ? -far : far);
}

MK_INLINE Vec<double> tanh(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_tanh(x[i]);
  return x;
}

}  // namespace
}  // namespace memkernels
