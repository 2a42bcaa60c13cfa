// selective_scan of one token a row, in place: lanes are the states of a channel, as they lie in
// the pool, which is read and written once, 8 bytes a state.
#include "scan/selective_scan_cpu.h"

namespace memkernels::scan {
namespace {

template <class T>
struct Step {
  using Real = Acc<T>;
  static constexpr int W = kLanes<Real>;

  static void step(const SelectiveScanStepArgs& a, const Channels& block, int64_t row,
                   int64_t slot) {
    T* const out = at<T>(a.out, row);
    if (slot < 0) {
      memset(out + block.first, 0, block.count * sizeof(T));
      return;
    }
    const int64_t states = a.A.shape[1];
    const T *u = at<T>(a.u, row), *delta_row = at<T>(a.delta, row);
    const T* z = row_of<T>(a.z, row);
    Real B[kMostStates], C[kMostStates], delta[kChannels], input[kChannels];
    read_row(at<T>(a.B, row, block.group), states, B);
    read_row(at<T>(a.C, row, block.group), states, C);
    for (int64_t c = 0; c < block.count; c += W) {
      const int64_t channel = block.first + c, left = block.count - c;
      const Vec<Real> dt = Delta<Real>(a, delta_row, channel, left).value;
      store(delta + c, dt);
      store(input + c, dt * load_some(u + channel, left));
    }
    for (int64_t c = 0; c < block.count; c += W) {
      const int64_t channel = block.first + c, left = block.count - c;
      const Real* const A = at<Real>(a.A, channel);
      Real* const h = at<Real>(a.state, slot) + channel * states;
      Vec<Real> sums[W] = {};
      const auto move_on = [&](int64_t s, int64_t size) __attribute__((always_inline)) {
        const Vec<Real> from = load(B + s), to = load(C + s);
#pragma GCC unroll 16
        for (int64_t i = 0; i < W; ++i) {
          if (i >= left) continue;
          const Real* const A_row = A + i * a.A.stride[0] + s;
          Real* const h_row = h + i * states + s;
          const Vec<Real> decay = exp_or_inf(delta[c + i] * load_some(A_row, size));
          const Vec<Real> next = decay * load_some(h_row, size) + input[c + i] * from;
          store_some(h_row, size, next);
          sums[i] += next * to;
        }
      };
      int64_t s = 0;
      for (; s + W <= states; s += W) move_on(s, W);
      if (s < states) move_on(s, states - s);
      write_out(a, z, channel, left, load_some(u + channel, left), sum_each<Real>(sums), out);
    }
  }
};

}  // namespace

namespace cpu::MEMKERNELS_ISA {

SelectiveScanStepKernel selective_scan_step_kernel(Dtype dtype) {
  switch (dtype) {
    case Dtype::bf16:
      return Step<bf16>::step;
    case Dtype::f16:
      return Step<f16>::step;
#if defined(MEMKERNELS_BASELINE)
    case Dtype::f64:
      return Step<double>::step;
#endif
    default:
      return Step<float>::step;
  }
}

}  // namespace cpu::MEMKERNELS_ISA
}  // namespace memkernels::scan
