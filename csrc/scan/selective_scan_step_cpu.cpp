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
    T* const out = at<T>(a.out, row) + block.first;
    if (slot < 0) {
      memset(out, 0, block.count * sizeof(T));
      return;
    }
    const int64_t states = a.A.shape[1];
    Real B[kMostStates], C[kMostStates];
    read_row(at<T>(a.B, row, block.group), states, B);
    read_row(at<T>(a.C, row, block.group), states, C);
    const T *u = at<T>(a.u, row), *delta = at<T>(a.delta, row);
    const T* z = a.z.data == nullptr ? nullptr : at<T>(a.z, row);
    const Real* D = static_cast<const Real*>(a.D.data);
    const Real* A = at<Real>(a.A, block.first);
    Real* h = at<Real>(a.state, slot) + block.first * states;
    for (int64_t c = 0; c < block.count; c += W) {
      const int64_t channel = block.first + c, left = block.count - c;
      const Vec<Real> dt = Delta<Real>(a, delta, channel, left).value;
      const Vec<Real> input = load_some(u + channel, left), scaled = dt * input;
      Vec<Real> sums[W] = {};
      for (int i = 0; i < W && i < left; ++i, A += a.A.stride[0], h += states) {
        for (int64_t s = 0; s < states; s += W) {
          const Vec<Real> next =
              exp_or_inf(dt[i] * load_some(A + s, states - s)) * load_some(h + s, states - s) +
              scaled[i] * load(B + s);
          store_some(h + s, states - s, next);
          sums[i] += next * load(C + s);
        }
      }
      Vec<Real> y = sum_each<Real>(sums);
      if (D != nullptr) y += load_some(D + channel, left) * input;
      if (z != nullptr) {
        const Vec<Real> gate = load_some(z + channel, left);
        y *= gate * sigmoid<Real>(gate);
      }
      store_some(out + c, left, y);
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
