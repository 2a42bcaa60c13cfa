// out[i] = sum over list i of factor * row: forward, rows of the table; backward, rows of the
// result's gradient, listed by the row of the table that they flow into. And for the gradient of
// the factors x[i] . row.
//
// Cost: entries * D multiply-adds, far fewer than the loads they wait for: each row is read from
// wherever it lies, entries * D elements in all.
#include "lookup/embedding_bag.h"

#include "core/cpu/arena.h"
#include "lookup/rows_cpu.h"

namespace memkernels::lookup {
namespace {

template <class A>
size_t padded_row_bytes(int64_t dim) {
  Arena arena{nullptr};
  arena.take<A>(round_up(dim, kLanes<A>));
  return arena.used;
}

float scale_of(const TensorView& scales, int64_t row, int64_t block) {
  const int64_t at = row * scales.stride[0] + block * scales.stride[1];
  if (scales.dtype == Dtype::f32) return static_cast<const float*>(scales.data)[at];
  const uint32_t exponent = static_cast<const uint8_t*>(scales.data)[at];
  return bit_cast<float>(exponent == 255 ? 0x7fc00000u
                         : exponent == 0 ? 0x400000u
                                         : exponent << 23);
}

// sums += factor * scales * row
template <class R>
MK_INLINE void add_quantised(const R* row, int64_t columns, const TensorView& scales, int64_t index,
                             float factor, float* sums) {
  constexpr int W = kLanes<float>;
  const int64_t blocks = scales.shape[1], block = columns / blocks;
  for (int64_t b = 0; b < blocks; ++b, row += block, sums += block) {
    const float scale = factor * scale_of(scales, index, b);
    int64_t c = 0;
    for (; c + W <= block; c += W) store(sums + c, load(sums + c) + scale * load_elements(row + c));
    if (c == block) continue;
    const Vec<float> rest = scale * load_some_elements(row + c, block - c);
    for (int64_t i = c; i < block; ++i) sums[i] += rest[i - c];
  }
}

// x . (scales * row)
template <class R>
MK_INLINE float multiply_quantised(const R* row, int64_t columns, const TensorView& scales,
                                   int64_t index, const float* x) {
  constexpr int W = kLanes<float>;
  const int64_t blocks = scales.shape[1], block = columns / blocks;
  Vec<float> sums{};
  for (int64_t b = 0; b < blocks; ++b, row += block, x += block) {
    const float scale = scale_of(scales, index, b);
    int64_t c = 0;
    for (; c + W <= block; c += W) sums += scale * load(x + c) * load_elements(row + c);
    if (c == block) continue;
    sums += scale * load_some(x + c, block - c) * load_some_elements(row + c, block - c);
  }
  return sum<float>(sums);
}

// Calls body(place, index, row) for the entries of a list that are not -1, in order.
template <class R, class Body>
MK_INLINE void for_quantised(const Lists& lists, int64_t list, const Table<R>& table,
                             const TensorView& scales, const Body& body) {
  const char* const first_scale = static_cast<const char*>(scales.data);
  const int64_t scale_bytes = scales.stride[0] * (scales.dtype == Dtype::f32 ? sizeof(float) : 1);
  for_groups(lists, list, table.ahead,
             [&](auto group, auto* places, auto* rows, auto* next) __attribute__((always_inline)) {
               for (int g = 0; g < decltype(group)::value; ++g) {
                 const R* later = table.row(next[g]);
                 for (int64_t c = 0; c < table.columns; c += kLine) prefetch_line(later + c);
                 prefetch_line(first_scale + next[g] * scale_bytes);
                 body(places[g], rows[g], table.row(rows[g]));
               }
             });
}

template <class R, class Write>
void sum_quantised(const SumArgs& args, int64_t list, const Table<R>& table, float* sums,
                   const Write& write) {
  constexpr int W = kLanes<float>;
  const float* factors = static_cast<const float*>(args.lists.factors);
  for (int64_t c = 0; c < table.columns; c += W) store(sums + c, Vec<float>{});
  for_quantised(args.lists, list, table, args.scales,
                [&](int64_t place, int64_t index, const R* row) __attribute__((always_inline)) {
                  add_quantised(row, table.columns, args.scales, index, factors[place], sums);
                });
  for (int64_t c = 0; c < table.columns; c += W) write(c, table.columns - c, load(sums + c));
}

template <class R>
void sum_rows(const SumArgs& args, const Cut& cut, void* scratch) {
  using A = Acc<R>;
  const Table<R> table(args.table, cut.column, cut.columns);
  const auto sum_into = [&](auto* out) {
    for (int64_t list = cut.begin; list < cut.end; ++list) {
      const int64_t row = args.out_rows == nullptr ? list : args.out_rows[list];
      auto* const to = out + row * args.out.stride[0] + cut.column;
      const auto write = [&](int64_t c, int64_t left, Vec<A> sums) __attribute__((always_inline)) {
        if (args.accumulate) sums += load_some(to + c, left);
        store_some(to + c, left, sums);
      };
      if constexpr (kQuantised<R>) {
        sum_quantised(args, list, table, static_cast<float*>(scratch), write);
      } else {
        sum_list(args.lists, list, table, static_cast<const A*>(args.lists.factors), write);
      }
    }
  };
  if constexpr (kQuantised<R>) {
    sum_into(static_cast<float*>(args.out.data));
  } else if (args.out.dtype == args.table.dtype) {
    sum_into(static_cast<R*>(args.out.data));
  } else {
    sum_into(static_cast<A*>(args.out.data));
  }
}

template <class R>
void multiply_rows(const ProductArgs& args, const Cut& cut, void* scratch) {
  using A = Acc<R>;
  const Table<R> table(args.table, 0, args.table.shape[1]);
  A* x = static_cast<A*>(scratch);
  A* out = static_cast<A*>(args.out);
  for (int64_t list = cut.begin; list < cut.end; ++list) {
    if constexpr (kQuantised<R>) {
      read_row<float>(args.x, list, x);
      for (int64_t i = args.lists.starts[list]; i < args.lists.starts[list + 1]; ++i) out[i] = 0;
      for_quantised(args.lists, list, table, args.scales,
                    [&](int64_t place, int64_t index, const R* row) __attribute__((always_inline)) {
                      out[place] = multiply_quantised(row, table.columns, args.scales, index, x);
                    });
    } else {
      read_row<R>(args.x, list, x);
      multiply_list(args.lists, list, table, x, out);
    }
  }
}

template <class T>
void widen(const void* from, int64_t n, float* to) {
  const T* p = static_cast<const T*>(from);
  for (int64_t i = 0; i < n; i += kLanes<float>) store_some(to + i, n - i, load_some(p + i, n - i));
}

template <class R>
constexpr SumKernel sum_kernel() {
  return {padded_row_bytes<Acc<R>>, sum_rows<R>};
}

template <class R>
constexpr ProductKernel product_kernel() {
  return {padded_row_bytes<Acc<R>>, multiply_rows<R>};
}

}  // namespace

namespace cpu::MEMKERNELS_ISA {

WidenKernel widen_kernel(Dtype from) {
  return from == Dtype::bf16 ? widen<bf16> : from == Dtype::f16 ? widen<f16> : widen<float>;
}

SumKernel sum_rows_kernel(Dtype table) {
  switch (table) {
    case Dtype::bf16:
      return sum_kernel<bf16>();
    case Dtype::f16:
      return sum_kernel<f16>();
    case Dtype::i8:
      return sum_kernel<int8_t>();
    case Dtype::e4m3:
      return sum_kernel<e4m3>();
#if defined(MEMKERNELS_BASELINE)
    case Dtype::f64:
      return sum_kernel<double>();
#endif
    default:
      return sum_kernel<float>();
  }
}

ProductKernel multiply_rows_kernel(Dtype table) {
  switch (table) {
    case Dtype::bf16:
      return product_kernel<bf16>();
    case Dtype::f16:
      return product_kernel<f16>();
    case Dtype::i8:
      return product_kernel<int8_t>();
    case Dtype::e4m3:
      return product_kernel<e4m3>();
#if defined(MEMKERNELS_BASELINE)
    case Dtype::f64:
      return product_kernel<double>();
#endif
    default:
      return product_kernel<float>();
  }
}

}  // namespace cpu::MEMKERNELS_ISA
}  // namespace memkernels::lookup
