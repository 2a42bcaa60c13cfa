// h = exp(delta A) h + delta u B; y = C . h + D u; out = y silu(z), of every channel and token. D S
// exponentials a token, beside which nothing else counts: a block of channels keeps its states and
// its part of A in the nearest cache, a lane a channel, and rows of B and C are broadcast.
#include "scan/selective_scan_cpu.h"

#include "core/cpu/arena.h"

namespace memkernels::scan {
namespace {

template <class T>
struct Scan {
  using Real = Acc<T>;
  static constexpr int W = kLanes<Real>;

  struct Scratch {
    Real *A, *h;          // states of a block
    Real *delta, *u, *y;  // [kChunk, kChannels]
    size_t bytes;

    Scratch(void* base, int64_t states) {
      Arena arena{static_cast<char*>(base)};
      A = arena.take<Real>(states * kChannels);
      h = arena.take<Real>(states * kChannels);
      delta = arena.take<Real>(kChunk * kChannels);
      u = arena.take<Real>(kChunk * kChannels);
      y = arena.take<Real>(kChunk * kChannels);
      bytes = arena.used;
    }
  };

  static size_t scratch_bytes(int64_t states) { return Scratch(nullptr, states).bytes; }

  static void forward(const SelectiveScanArgs& a, const Channels& block, int64_t begin, int64_t end,
                      void* scratch) {
    const int64_t states = a.A.shape[1];
    const Scratch s(scratch, states);
    read_states(at<Real>(a.A, 0), a.A.stride[0], states, block, s.A);
    for (int64_t n = begin; n < end; ++n) {
      const Span span = a.sequences[n];
      read_states(a.initial_state, n, states, block, s.h);
      for (int64_t t = span.begin; t < span.end; t += kChunk) {
        const int64_t count = span.end - t < kChunk ? span.end - t : kChunk;
        read_inputs<T>(a, block, span.batch, t, count, s.delta, s.u, nullptr);
        for (int64_t i = 0; i < count; ++i) {
          const int64_t row = i * kChannels;
          prefetch_row<T>(a.u, span.batch, t + kChunk + i, block);
          prefetch_row<T>(a.delta, span.batch, t + kChunk + i, block);
          if (a.z.data != nullptr) prefetch_row<T>(a.z, span.batch, t + i, block);
          move_on<T>(a, block, span.batch, t + i, s.delta + row, s.u + row, s.A, s.h, s.h,
                     s.y + row, nullptr);
        }
        for (int64_t i = 0; i < count; ++i) {
          const T* const z = row_of<T>(a.z, span.batch, t + i);
          T* const out = at<T>(a.out, span.batch, t + i);
          for (int64_t c = 0; c < block.count; c += W) {
            const int64_t row = i * kChannels + c;
            write_out(a, z, block.first + c, block.count - c, load(s.u + row), load(s.y + row),
                      out);
          }
        }
      }
      if (a.state.data != nullptr) write_states(s.h, states, block, at<Real>(a.state, n));
    }
  }
};

template <class T>
constexpr SelectiveScanKernel kernel_for() {
  return {Scan<T>::scratch_bytes, Scan<T>::forward};
}

}  // namespace

namespace cpu::MEMKERNELS_ISA {

SelectiveScanKernel selective_scan_kernel(Dtype dtype) {
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
}  // namespace memkernels::scan
