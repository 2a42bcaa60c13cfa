// h[t] = a[t] h[t - 1] + x[t]; x and a are read and h is written once, 12 bytes an element in
// float32. Rows are taken as wide as the number of workers allows, so that memory is read along
// them; what goes from token to token stays in the nearest cache.
//
// Backward: dx[t] = dh[t] + conj(a[t + 1]) dx[t + 1], da[t] = dx[t] conj(h[t - 1]), from h as it
// was rounded; 20 bytes an element. A da of all tokens is summed by stretches: one long chain would
// round more.
#include "scan/diagonal_scan.h"
#include "scan/rows_cpu.h"

namespace memkernels::scan {
namespace {

constexpr int64_t kStretch = 256;

template <class T, bool kComplex>
struct Scan {
  using Real = Acc<T>;
  static constexpr int W = kLanes<Real>;

  // a b, or conj(a) b, of numbers or of (real, imaginary) pairs.
  static MK_INLINE Vec<Real> multiply(Vec<Real> a, Vec<Real> b, bool conjugate) {
    if constexpr (kComplex) {
      Lane<Real> reals{}, imaginaries{}, swapped{};
      Vec<Real> sign{};
      for (int i = 0; i < W; ++i) {
        reals[i] = i & ~1;
        imaginaries[i] = i | 1;
        swapped[i] = i ^ 1;
        sign[i] = (i % 2 == 0) == conjugate ? 1 : -1;
      }
      return MK_SHUFFLE(Real, a, a, reals) * b +
             MK_SHUFFLE(Real, a, a, imaginaries) * sign * MK_SHUFFLE(Real, b, b, swapped);
    } else {
      return a * b;
    }
  }

  // body(i, left) for the vectors of a row.
  template <class Body>
  static MK_INLINE void for_vectors(int64_t size, const Body& body) {
    int64_t i = 0;
    for (; i + W <= size; i += W) body(i, W);
    if (i < size) body(i, size - i);
  }

  static bool resets(const DiagonalScanArgs& s, int64_t batch, int64_t t) {
    return s.reset.data != nullptr && *at<uint8_t>(s.reset, batch, t) != 0;
  }

  // The row of a token in a tensor, or the one of all tokens.
  static const T* decay_row(const DiagonalScanArgs& s, int64_t batch, int64_t t) {
    return s.a.ndim == s.h.ndim ? at<T>(s.a, batch, t) : static_cast<const T*>(s.a.data);
  }

  static void forward(const DiagonalScanArgs& s, int64_t sequence, int64_t begin, int64_t end,
                      void* scratch) {
    const Span span = s.sequences[sequence];
    const int64_t size = end - begin;
    Real* const carry = static_cast<Real*>(scratch);
    read_state(s.initial_state, sequence, begin, size, carry);
    for (int64_t t = span.begin; t < span.end; ++t) {
      const T* const x = at<T>(s.x, span.batch, t) + begin;
      const T* const a = decay_row(s, span.batch, t) + begin;
      T* const h = at<T>(s.h, span.batch, t) + begin;
      if (resets(s, span.batch, t)) memset(carry, 0, size * sizeof(Real));
      for_vectors(size, [&](int64_t i, int64_t left) __attribute__((always_inline)) {
        const Vec<Real> next = multiply(load_some(a + i, left), load_some(carry + i, left), false) +
                               load_some(x + i, left);
        store_some(carry + i, left, next);
        store_some(h + i, left, next);
      });
    }
    if (s.state.data != nullptr) write_state(carry, size, s.state, sequence, begin);
  }

  static void read_state(const TensorView& from, int64_t sequence, int64_t begin, int64_t size,
                         Real* to) {
    if (from.data == nullptr) {
      memset(to, 0, size * sizeof(Real));
    } else {
      memcpy(to, at<Real>(from, sequence) + begin, size * sizeof(Real));
    }
  }

  static void write_state(const Real* from, int64_t size, const TensorView& to, int64_t sequence,
                          int64_t begin) {
    memcpy(at<Real>(to, sequence) + begin, from, size * sizeof(Real));
  }

  static void backward(const DiagonalScanArgs& s, const DiagonalScanGrads& g, int64_t sequence,
                       int64_t begin, int64_t end, void* scratch) {
    const Span span = s.sequences[sequence];
    const int64_t size = end - begin;
    Real* const carry = static_cast<Real*>(scratch);
    Real *const stretch = carry + size, *const total = stretch + size;
    const bool for_a = g.da.data != nullptr, constant = s.a.ndim < s.h.ndim;
    read_state(g.dstate, sequence, begin, size, carry);
    if (constant) memset(stretch, 0, 2 * size * sizeof(Real));
    for (int64_t t = span.end - 1; t >= span.begin; --t) {
      const T* const dh = at<T>(g.dh, span.batch, t) + begin;
      const T* const a = decay_row(s, span.batch, t) + begin;
      T* const dx = g.dx.data == nullptr ? nullptr : at<T>(g.dx, span.batch, t) + begin;
      T* const da = for_a && !constant ? at<T>(g.da, span.batch, t) + begin : nullptr;
      // before: h of the token before, or null for 0.
      const auto token = [&](const auto* before) __attribute__((always_inline)) {
        for_vectors(size, [&](int64_t i, int64_t left) __attribute__((always_inline)) {
          const Vec<Real> grad = load_some(dh + i, left) + load_some(carry + i, left);
          store_some(carry + i, left, multiply(load_some(a + i, left), grad, true));
          if (dx != nullptr) store_some(dx + i, left, grad);
          if (!for_a) return;
          const Vec<Real> past = before == nullptr ? Vec<Real>{} : load_some(before + i, left);
          const Vec<Real> term = multiply(past, grad, true);
          if (constant) {
            store_some(stretch + i, left, load_some(stretch + i, left) + term);
          } else {
            store_some(da + i, left, term);
          }
        });
      };
      if (resets(s, span.batch, t)) {
        token(static_cast<const T*>(nullptr));
        memset(carry, 0, size * sizeof(Real));
      } else if (t > span.begin) {
        token(at<const T>(s.h, span.batch, t - 1) + begin);
      } else {
        const bool given = s.initial_state.data != nullptr;
        token(given ? at<const Real>(s.initial_state, sequence) + begin : nullptr);
      }
      if (constant && ((t - span.begin) % kStretch == 0)) {
        for (int64_t i = 0; i < size; ++i) total[i] += stretch[i];
        memset(stretch, 0, size * sizeof(Real));
      }
    }
    if (for_a && constant) write_state(total, size, g.da, sequence, begin);
    if (g.dinitial_state.data != nullptr)
      write_state(carry, size, g.dinitial_state, sequence, begin);
  }
};

template <class T>
constexpr DiagonalScanKernel kernel_for(bool complex) {
  return complex ? DiagonalScanKernel{Scan<T, true>::forward, Scan<T, true>::backward}
                 : DiagonalScanKernel{Scan<T, false>::forward, Scan<T, false>::backward};
}

}  // namespace

namespace cpu::MEMKERNELS_ISA {

DiagonalScanKernel diagonal_scan_kernel(Dtype dtype, bool complex) {
  switch (dtype) {
    case Dtype::bf16:
      return kernel_for<bf16>(complex);
    case Dtype::f16:
      return kernel_for<f16>(complex);
#if defined(MEMKERNELS_BASELINE)
    case Dtype::f64:
      return kernel_for<double>(complex);
#endif
    default:
      return kernel_for<float>(complex);
  }
}

}  // namespace cpu::MEMKERNELS_ISA
}  // namespace memkernels::scan
