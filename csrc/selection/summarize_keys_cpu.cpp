// The smallest and the largest of each channel over the keys of a page, or their mean. Each key is
// read once, several side by side, so that accumulators are loaded and stored once for them all.
#include "core/cpu/arena.h"
#include "core/cpu/simd.h"
#include "selection/summarize_keys.h"

namespace memkernels::selection {
namespace {

constexpr int kTokens = 8;

// What becomes of a channel: its minimum and maximum, in which a NaN stays.
template <class A>
struct MinMax {
  static constexpr int kAccumulators = 2;
  Vec<A> least, most;
  Lane<A> nan;
  MK_INLINE void begin(Vec<A> x) {
    least = most = x;
    nan = x != x;
  }
  MK_INLINE void resume(const A* acc, int64_t stride) {
    least = load(acc);
    most = load(acc + stride);
    nan = Lane<A>{};
  }
  MK_INLINE void add(Vec<A> x) {
    least = x < least ? x : least;
    most = x > most ? x : most;
    nan |= x != x;
  }
  MK_INLINE void leave(A* acc, int64_t stride) const {
    const Vec<A> invalid = splat(static_cast<A>(__builtin_nan("")));
    store(acc, nan ? invalid : least);
    store(acc + stride, nan ? invalid : most);
  }
};

template <class A>
struct Sum {
  static constexpr int kAccumulators = 1;
  Vec<A> sum;
  MK_INLINE void begin(Vec<A> x) { sum = x; }
  MK_INLINE void resume(const A* acc, int64_t) { sum = load(acc); }
  MK_INLINE void add(Vec<A> x) { sum += x; }
  MK_INLINE void leave(A* acc, int64_t) const { store(acc, sum); }
};

// Adds `count` keys of one head, the first of the page if `first`.
template <class T, class Reducer>
MK_INLINE void add_keys(const T* keys, int64_t token_stride, int64_t count, bool first, int64_t dim,
                        Acc<T>* acc, int64_t stride) {
  constexpr int W = kLanes<Acc<T>>;
  for (int64_t d = 0; d < dim; d += kPair<T>) {
    Reducer a, b;
    Vec<Acc<T>> x, y;
    const auto read = [&](int64_t t) __attribute__((always_inline)) {
      if (d + kPair<T> <= dim) {
        load_pair(keys + t * token_stride + d, x, y);
      } else {
        load_pair_tail(keys + t * token_stride + d, dim - d, x, y);
      }
    };
    if (first) {
      read(0);
      a.begin(x);
      b.begin(y);
    } else {
      a.resume(acc + d, stride);
      b.resume(acc + d + W, stride);
    }
    for (int64_t t = first ? 1 : 0; t < count; ++t) {
      read(t);
      // Of this page or of the next, which mostly comes after it.
      prefetch_line(keys + (t + kTokens) * token_stride + d);
      a.add(x);
      b.add(y);
    }
    a.leave(acc + d, stride);
    b.leave(acc + d + W, stride);
  }
}

template <class T>
struct Summarize {
  using A = Acc<T>;

  static size_t scratch_bytes(int64_t heads, int64_t dim) {
    return heads * 2 * round_up(dim, kPair<T>) * sizeof(A);
  }

  template <class Reducer>
  static void reduce(const SummaryPage& page, A* acc) {
    const T* keys = static_cast<const T*>(page.keys);
    const int64_t stride = round_up(page.dim, kPair<T>);
    // Heads of a token that lie side by side are read together; else a head's tokens are.
    const int64_t step = page.head_stride < page.token_stride ? kTokens : page.tokens;
    for (int64_t t = 0; t < page.tokens; t += step) {
      const int64_t count = page.tokens - t < step ? page.tokens - t : step;
      for (int64_t h = 0; h < page.heads; ++h) {
        add_keys<T, Reducer>(keys + t * page.token_stride + h * page.head_stride, page.token_stride,
                             count, t == 0, page.dim, acc + h * Reducer::kAccumulators * stride,
                             stride);
      }
    }
  }

  static void run(const SummaryPage& page, SummaryKind kind, void* scratch) {
    A* acc = static_cast<A*>(scratch);
    const int64_t stride = round_up(page.dim, kPair<T>);
    if (kind == SummaryKind::minmax) {
      T* out = static_cast<T*>(page.summary);
      const int64_t rows = page.heads * 2;
      if (page.tokens == 0) {
        memset(static_cast<void*>(out), 0, rows * page.dim * sizeof(T));
        return;
      }
      reduce<MinMax<A>>(page, acc);
      for (int64_t r = 0; r < rows; ++r) {
        pack_row<T>(acc + r * stride, page.dim, A(1), out + r * page.dim);
      }
      return;
    }
    A* out = static_cast<A*>(page.summary);
    if (page.tokens == 0) {
      memset(out, 0, page.heads * page.dim * sizeof(A));
      return;
    }
    reduce<Sum<A>>(page, acc);
    for (int64_t h = 0; h < page.heads; ++h) {
      write_means(acc + h * stride, page.dim, static_cast<A>(page.tokens), out + h * page.dim);
    }
  }

  // Sums in pair order to means in the order of channels.
  static void write_means(const A* sums, int64_t dim, A count, A* out) {
    constexpr int W = kLanes<A>;
    for (int64_t d = 0; d < dim; ++d) {
      const int64_t within = d % kPair<T>;
      const int64_t lane = __is_same(T, bf16) ? within % 2 * W + within / 2 : within;
      out[d] = sums[d - within + lane] / count;
    }
  }
};

template <class T>
constexpr SummaryKernel kernel_for() {
  return {Summarize<T>::scratch_bytes, Summarize<T>::run};
}

}  // namespace

namespace cpu::MEMKERNELS_ISA {

SummaryKernel summary_kernel(Dtype dtype) {
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
