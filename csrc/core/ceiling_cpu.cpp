// Streaming loads and register-only multiply-adds: what no kernel can exceed.
#include "core/ceiling.h"
#include "core/cpu/tile.h"

// Makes the compiler believe that the vector register is read and written here.
#if defined(MK_KEEP)  // emulated vectors fit no register
#elif defined(__x86_64__)
#define MK_KEEP(v) asm volatile("" : "+v"(v))
#else
#define MK_KEEP(v) asm volatile("" : "+w"(v))
#endif

namespace memkernels {
namespace {

double read(const char* data, int64_t bytes) {
  constexpr int kStreams = 4;
  Vec<float> sums[kStreams] = {};
  int64_t at = 0;
  for (; at + kStreams * kVectorBytes <= bytes; at += kStreams * kVectorBytes) {
    for (int i = 0; i < kStreams; ++i) {
      sums[i] += load(reinterpret_cast<const float*>(data + at + i * kVectorBytes));
    }
  }
  return sum<float>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// A tile's accumulators, multiplied and added to without touching memory.
template <class M>
double multiply_adds(int64_t rounds, double* sink) {
  using A = typename M::A;
  constexpr int kAccumulators = kTileRows * 2;
  Vec<A> acc[kAccumulators];
#pragma GCC unroll 16
  for (int i = 0; i < kAccumulators; ++i) acc[i] = splat(static_cast<A>(i));
  const typename M::Unit small = static_cast<typename M::Unit>(1e-3);
  Vec<A> values = splat(static_cast<A>(1e-3));
  for (int64_t n = 0; n < rounds; ++n) {
    MK_KEEP(values);  // else the product is computed once
#pragma GCC unroll 16
    for (int i = 0; i < kAccumulators; ++i) {
      acc[i] = M::fma(small, values, acc[i]);
      MK_KEEP(acc[i]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kAccumulators; ++i) *sink += sum<A>(acc[i]);
  return 2.0 * M::kElements * kLanes<A> * kAccumulators * static_cast<double>(rounds);
}

double flops(Dtype dtype, int64_t rounds, double* sink) {
  switch (dtype) {
    case Dtype::bf16:
      return multiply_adds<Math<bf16>>(rounds, sink);
    case Dtype::f64:
      return multiply_adds<F64>(rounds, sink);
    default:
      return multiply_adds<F32>(rounds, sink);
  }
}

}  // namespace

namespace cpu::MEMKERNELS_ISA {

CeilingKernel ceiling_kernel() { return {read, flops}; }

}  // namespace cpu::MEMKERNELS_ISA
}  // namespace memkernels
