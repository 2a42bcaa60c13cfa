// What lookups do with the rows of a table: add up those that a list names, some columns at a time,
// and multiply them with a vector, some rows at a time, while later ones are asked for.
//
// A column's sum takes the rows in the list's order, and a product the columns in one order, so
// that no bit depends on how work is cut or grouped.
#pragma once

#include "core/cpu/columns.h"
#include "core/tensor.h"
#include "lookup/lists.h"

namespace memkernels::lookup {
namespace {

// Rows side by side: their loads wait for memory together.
constexpr int kGroup = 4;
constexpr int kLine = 64;

struct e4m3 {
  uint8_t bits;
};

template <class R>
constexpr bool kQuantised = sizeof(R) == 1;

template <class R>
MK_INLINE Vec<Acc<R>> load_elements(const R* p) {
  return load_ordered(p);
}

// GCC converts vectors of bytes one by one.
template <class Byte>
MK_INLINE VecI32 load_bytes(const void* p) {
  [[maybe_unused]] constexpr bool kSigned = Byte(-1) < 0;
#if defined(__AVX512F__)
  const __m128i bytes = _mm_loadu_si128(static_cast<const __m128i*>(p));
  return bit_cast<VecI32>(kSigned ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
#elif defined(__AVX2__)
  const __m128i bytes = _mm_loadl_epi64(static_cast<const __m128i*>(p));
  return bit_cast<VecI32>(kSigned ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
#else
  VecI32 out;
  for (int i = 0; i < kLanes<float>; ++i) out[i] = static_cast<const Byte*>(p)[i];
  return out;
#endif
}

MK_INLINE Vec<float> load_elements(const int8_t* p) {
  return __builtin_convertvector(load_bytes<int8_t>(p), Vec<float>);
}

MK_INLINE Vec<float> load_elements(const e4m3* p) {
  const VecI32 bits = load_bytes<uint8_t>(p), magnitude = bits & 0x7f;
  // The exponent's bias goes from 7 to 127. Subnormals are got by a difference, since tiny floats
  // may be flushed to zero.
  const Vec<float> x = bit_cast<Vec<float>>((magnitude << 20) + (120 << 23));
  const VecI32 size = bit_cast<VecI32>(magnitude < 8 ? x + x - 0x1p-6f : x);
  const VecI32 value = magnitude == 0x7f ? VecI32{} + 0x7fc00000 : size;
  return bit_cast<Vec<float>>(value | (bits & 0x80) << 24);
}

// load_some() of elements that load_elements() knows.
template <class R>
MK_INLINE Vec<Acc<R>> load_some_elements(const R* p, int64_t left) {
  constexpr int W = kLanes<Acc<R>>;
  if (left >= W) return load_elements(p);
  R padded[W] = {};
  for (int64_t i = 0; i < left; ++i) padded[i] = p[i];
  return load_elements(padded);
}

// Columns [column, column + columns) of a table's rows.
template <class R>
struct Table {
  const R* data;
  int64_t stride;
  int64_t columns;
  int64_t ahead;  // rows, of the group that is computed with

  Table(const TensorView& t, int64_t column, int64_t columns)
      : data(static_cast<const R*>(t.data) + column),
        stride(t.stride[0]),
        columns(columns),
        ahead(kGroup + 8192 / (columns * static_cast<int64_t>(sizeof(R)) + kLine)) {}

  const R* row(int64_t i) const { return data + i * stride; }
};

// products[g] = x . rows[g]; x is padded with zeros to whole vectors.
template <int G, class R, class A = Acc<R>>
MK_INLINE void multiply_rows(const Table<R>& table, const int64_t* rows, const int64_t* next,
                             const A* x, A* products) {
  constexpr int W = kLanes<A>;
  constexpr int kStep = kLine / static_cast<int>(sizeof(R));
  const R *at[G], *later[G];
  for (int g = 0; g < G; ++g) {
    at[g] = table.row(rows[g]);
    later[g] = table.row(next[g]);
  }
  Vec<A> sums[G] = {};
  int64_t c = 0;
  for (; c + kStep <= table.columns; c += kStep) {
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) prefetch_line(later[g] + c);
#pragma GCC unroll 8
    for (int v = 0; v < kStep; v += W) {
      const Vec<A> y = load(x + c + v);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) sums[g] += y * load_elements(at[g] + c + v);
    }
  }
  for (; c < table.columns; c += W) {
    for (int g = 0; g < G; ++g) {
      sums[g] += load(x + c) * load_some_elements(at[g] + c, table.columns - c);
    }
  }
  for (int g = 0; g < G; ++g) products[g] = sum<A>(sums[g]);
}

// Calls body(group size, places, rows, next) for the entries of a list that are not -1, in order:
// their places in the lists, their rows, and rows that will be needed later.
template <class Body>
MK_INLINE void for_groups(const Lists& lists, int64_t list, int64_t ahead, const Body& body) {
  const int64_t end = lists.starts[list + 1], entries = lists.starts[lists.count];
  int64_t places[kGroup], rows[kGroup], next[kGroup];
  int found = 0;
  for (int64_t i = lists.starts[list]; i < end; ++i) {
    if (lists.rows[i] < 0) continue;
    const int64_t later = i + ahead < entries ? lists.rows[i + ahead] : -1;
    places[found] = i;
    rows[found] = lists.rows[i];
    next[found] = later < 0 ? rows[found] : later;
    if (++found < kGroup) continue;
    body(Int<kGroup>{}, places, rows, next);
    found = 0;
  }
  for (int g = 0; g < found; ++g) body(Int<1>{}, places + g, rows + g, next + g);
}

// Vectors of sums that stay in registers while the rows of a list go by.
constexpr int kSums = kRegisters == 32 ? 24 : 12;

// write(column, left, sums) for V vectors from `column` on of the sum of factors[place] * row over
// a list; of the last vector `left` elements exist.
template <int V, class R, class Write, class A = Acc<R>>
MK_INLINE void sum_block(const Lists& lists, int64_t list, const Table<R>& table, const A* factors,
                         int64_t column, int64_t left, const Write& write) {
  constexpr int W = kLanes<A>, kStep = kLine / static_cast<int>(sizeof(R));
  const int64_t* const rows = lists.rows;
  const int64_t end = lists.starts[list + 1], last = lists.starts[lists.count] - 1;
  constexpr int64_t kAhead = 3 + 8192 / (V * W * static_cast<int>(sizeof(R)));
  const int64_t stride = table.stride;
  const R* const data = table.data + column;
  Vec<A> sums[V] = {};
  for (int64_t i = lists.starts[list]; i < end; ++i) {
    const int64_t row = rows[i], later = rows[i + kAhead < last ? i + kAhead : last];
    if (row < 0) continue;
    const R* const next = data + (later < 0 ? row : later) * stride;
#pragma GCC unroll 24
    for (int c = 0; c < V * W; c += kStep) prefetch_line(next + c);
    const R* const at = data + row * stride;
    const Vec<A> factor = splat(factors[i]);
#pragma GCC unroll 24
    for (int v = 0; v < V - 1; ++v) sums[v] += factor * load_elements(at + v * W);
    sums[V - 1] += factor * load_some_elements(at + (V - 1) * W, left);
  }
#pragma GCC unroll 24
  for (int v = 0; v < V; ++v) write(column + v * W, v == V - 1 ? left : W, sums[v]);
}

// The same for all columns of a table.
template <class R, class Write, class A = Acc<R>>
MK_INLINE void sum_list(const Lists& lists, int64_t list, const Table<R>& table, const A* factors,
                        const Write& write) {
  constexpr int W = kLanes<A>;
  int64_t c = 0;
  const auto blocks = [&](auto vectors) __attribute__((always_inline)) {
    constexpr int V = decltype(vectors)::value;
    for (; c + V * W <= table.columns; c += V * W) {
      sum_block<V>(lists, list, table, factors, c, W, write);
    }
  };
  blocks(Int<kSums>{});
  blocks(Int<8>{});
  blocks(Int<4>{});
  blocks(Int<1>{});
  if (c < table.columns) {
    sum_block<1>(lists, list, table, factors, c, table.columns - c, write);
  }
}

// out[place] = x . row over a list, 0 for -1; x is padded with zeros to whole vectors.
template <class R, class A = Acc<R>>
MK_INLINE void multiply_list(const Lists& lists, int64_t list, const Table<R>& table, const A* x,
                             A* out) {
  for (int64_t i = lists.starts[list]; i < lists.starts[list + 1]; ++i) out[i] = 0;
  for_groups(lists, list, table.ahead,
             [&](auto group, auto* places, auto* rows, auto* next) __attribute__((always_inline)) {
               constexpr int G = decltype(group)::value;
               A products[G];
               multiply_rows<G>(table, rows, next, x, products);
               for (int g = 0; g < G; ++g) out[places[g]] = products[g];
             });
}

// A row of a tensor in accumulators, padded with zeros to whole vectors.
template <class R, class A = Acc<R>>
MK_INLINE void read_row(const TensorView& t, int64_t row, A* out) {
  const R* from = static_cast<const R*>(t.data) + row * t.stride[0];
  const int64_t columns = t.shape[1];
  for (int64_t c = 0; c < columns; c += kLanes<A>) {
    store(out + c, load_some_elements(from + c, columns - c));
  }
}

}  // namespace
}  // namespace memkernels::lookup
