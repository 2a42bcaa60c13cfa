// Streaming loads and stores, loads of scattered rows, and register-only multiply-adds: what no
// kernel can exceed.
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

// The next rows are asked for while one is read, as kernels do.
double gather(const char* data, int64_t row_bytes, const int64_t* rows, int64_t num_rows) {
  constexpr int64_t kAheadBytes = 16384;
  const int64_t ahead = 1 + kAheadBytes / (row_bytes + 1);
  double total = 0;
  for (int64_t i = 0; i < num_rows; ++i) {
    const char* next = data + rows[i + ahead < num_rows ? i + ahead : num_rows - 1] * row_bytes;
    constexpr int64_t kStep = 512;
    for (int64_t at = 0; at < row_bytes; at += kStep) {
      const int64_t size = row_bytes - at < kStep ? row_bytes - at : kStep;
      for (int64_t line = 0; line < size; line += 64) prefetch_line(next + at + line);
      total += read(data + rows[i] * row_bytes + at, size);
    }
  }
  return total;
}

void update(char* data, int64_t bytes) {
  float* x = reinterpret_cast<float*>(data);
  for (int64_t i = 0; i + kLanes<float> <= bytes / 4; i += kLanes<float>) {
    store(x + i, load(x + i) * 0.5f);
  }
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

CeilingKernel ceiling_kernel() { return {read, gather, update, flops}; }

}  // namespace cpu::MEMKERNELS_ISA
}  // namespace memkernels
