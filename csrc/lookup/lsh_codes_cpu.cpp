// code = sum_i [z_i >= 0] 2^(bits - 1 - i); score = S F, with S = sum_i |z_i| and
// F = 1 / prod_i (1 + e_i), e_i = e^(-2 |z_i|): one exponential an element. The product is at most
// 2^30, so that it needs no logarithms; what it exceeds 1 by is kept, which loses nothing where
// every e_i is small.
//
// Backward: dz_i = dscore sign(z_i) F (1 + 2 S e_i / (1 + e_i)).
#include "core/cpu/simd.h"
#include "lookup/lsh_codes.h"

namespace memkernels::lookup {
namespace {

template <class T>
struct Codes {
  using A = Acc<T>;
  static constexpr int W = kLanes<A>;

  // Row by row of the T * tables rows of a tensor.
  template <class X>
  struct Rows {
    const X* data;
    int64_t tables, token_stride, table_stride, t, table;

    Rows(const TensorView& x, int64_t first)
        : data(static_cast<const X*>(x.data)),
          tables(x.shape[1]),
          token_stride(x.stride[0]),
          table_stride(x.stride[1]),
          t(first / tables),
          table(first % tables) {}
    MK_INLINE const X* next() {
      const X* row = data + t * token_stride + table * table_stride;
      if (++table == tables) {
        table = 0;
        ++t;
      }
      return row;
    }
  };

  // As many rows as a vector has lanes, side by side.
  struct Block {
    int bits;
    A z[kMostBits * W];  // [bits, rows]
    Vec<A> e[kMostBits];
    Vec<A> sum{}, firmness;

    Block(const TensorView& x, int64_t first, int64_t count) : bits(x.shape[2]) {
      Rows<T> rows(x, first);
      if (count < W) memset(z, 0, sizeof(z));
      for (int64_t r = 0; r < count; ++r) {
        const T* row = rows.next();
        for (int i = 0; i < bits; ++i) z[i * W + r] = to_acc(row[i]);
      }
      Vec<A> excess{};
      for (int i = 0; i < bits; ++i) {
        const Vec<A> value = bit(i), size = value < 0 ? -value : value;
        e[i] = exp(size * A(-2));
        sum += size;
        excess += e[i] + excess * e[i];
      }
      firmness = 1 / (1 + excess);
    }

    MK_INLINE Vec<A> bit(int i) const { return load(z + i * W); }
  };

  template <class Body>
  static MK_INLINE void for_blocks(int64_t begin, int64_t end, const Body& body) {
    for (; begin < end; begin += W) body(begin, end - begin < W ? end - begin : W);
  }

  static void forward(const LshCodesArgs& a, int64_t begin, int64_t end) {
    for_blocks(begin, end, [&](int64_t first, int64_t count) {
      const Block block(a.z, first, count);
      Lane<A> code{};
      for (int i = 0; i < block.bits; ++i) code = code + code - (block.bit(i) >= 0);
      const Vec<A> score = block.sum * block.firmness;
      typedef int32_t Int32s __attribute__((vector_size(W * sizeof(int32_t))));
      const Int32s narrow = __builtin_convertvector(code, Int32s);
      memcpy(static_cast<int32_t*>(a.codes.data) + first, &narrow, count * sizeof(int32_t));
      memcpy(static_cast<A*>(a.scores.data) + first, &score, count * sizeof(A));
    });
  }

  static void backward(const LshCodesArgs& a, const LshCodesGrads& g, int64_t begin, int64_t end) {
    for_blocks(begin, end, [&](int64_t first, int64_t count) {
      const Block block(a.z, first, count);
      Vec<A> dscore{};
      Rows<A> dscores(g.dscores, first);
      for (int64_t r = 0; r < count; ++r) dscore[r] = *dscores.next();
      const Vec<A> twice = 2 * block.sum * block.firmness;
      A rows[kMostBits * W];  // [rows, bits]
      for (int i = 0; i < block.bits; ++i) {
        const Vec<A> z = block.bit(i), e = block.e[i];
        // NaN has no sign, and stays.
        const Vec<A> sign = z > 0 ? splat(A(1)) : z < 0 ? splat(A(-1)) : z * 0;
        const Vec<A> dz = dscore * sign * (block.firmness + twice * (e / (1 + e)));
        for (int r = 0; r < W; ++r) rows[r * block.bits + i] = dz[r];
      }
      T* to = static_cast<T*>(g.dz.data) + first * block.bits;
      const int64_t elements = count * block.bits;
      int64_t i = 0;
      for (; i + W <= elements; i += W) store_ordered(to + i, load(rows + i));
      for (; i < elements; ++i) to[i] = from_acc<T>(rows[i]);
    });
  }
};

template <class T>
constexpr LshCodesKernel kernel_for() {
  return {Codes<T>::forward, Codes<T>::backward};
}

}  // namespace

namespace cpu::MEMKERNELS_ISA {

LshCodesKernel lsh_codes_kernel(Dtype dtype) {
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
