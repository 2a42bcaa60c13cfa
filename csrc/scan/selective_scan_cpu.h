// What the selective scan's kernels have in common.
//
// The states of a block of channels lie as [vectors][S][lanes], lanes past the last channel 0.
#pragma once

#include "scan/rows_cpu.h"
#include "scan/selective_scan.h"

namespace memkernels::scan {
namespace {

// log(1 + e) for e from 0 to 1: 2 atanh(e / (2 + e)), to 1e-8 of itself.
MK_INLINE Vec<float> log1p(Vec<float> e) {
  const Vec<float> s = e / (2.0f + e), s2 = s * s;
  Vec<float> p = splat(1 / 13.0f);
  p = p * s2 + 1 / 11.0f;
  p = p * s2 + 1 / 9.0f;
  p = p * s2 + 1 / 7.0f;
  p = p * s2 + 1 / 5.0f;
  p = p * s2 + 1 / 3.0f;
  p = p * s2 + 1.0f;
  return (s + s) * p;
}
MK_INLINE Vec<double> log1p(Vec<double> e) {
  for (int i = 0; i < kLanes<double>; ++i) e[i] = __builtin_log1p(e[i]);
  return e;
}

// delta as the recurrence takes it, and its derivative by delta as it came.
template <class Real>
struct Delta {
  Vec<Real> value, slope;

  template <class Args, class T>
  MK_INLINE Delta(const Args& a, const T* row, int64_t channel, int64_t left) {
    const Real* bias = static_cast<const Real*>(a.delta_bias.data);
    const Vec<Real> one = splat(Real(1));
    value = load_some(row + channel, left);
    slope = one;
    if (bias != nullptr) value += load_some(bias + channel, left);
    if (!a.delta_softplus) return;
    const Vec<Real> x = value, e = exp(x < 0 ? x : -x);
    value = (x > 0 ? x : Vec<Real>{}) + log1p(e);
    slope = (x < 0 ? e : one) / (1 + e);
  }
};

// out of some channels from u and C . h.
template <class T, class Args>
MK_INLINE void write_out(const Args& a, const T* z, int64_t channel, int64_t left, Vec<Acc<T>> u,
                         Vec<Acc<T>> y, T* out) {
  using Real = Acc<T>;
  const Real* D = static_cast<const Real*>(a.D.data);
  if (D != nullptr) y += load_some(D + channel, left) * u;
  if (z != nullptr) {
    const Vec<Real> gate = load_some(z + channel, left);
    y *= gate * sigmoid<Real>(gate);
  }
  store_some(out + channel, left, y);
}

// The row of a token in a tensor that may be absent.
template <class T>
MK_INLINE T* row_of(const TensorView& t, int64_t i, int64_t j = 0) {
  return t.data == nullptr ? nullptr : at<T>(t, i, j);
}

// Rows [first, first + count) of a [*, S] matrix as states of a block.
template <class Real>
MK_INLINE void read_states(const Real* from, int64_t stride, int64_t states, const Channels& block,
                           Real* to) {
  constexpr int W = kLanes<Real>;
  for (int64_t c = 0; c < kChannels; ++c) {
    Real* lane = to + c / W * W * states + c % W;
    const Real* row = from + (block.first + c) * stride;
    for (int64_t s = 0; s < states; ++s) lane[s * W] = c < block.count ? row[s] : Real(0);
  }
}

template <class Real>
MK_INLINE void write_states(const Real* from, int64_t states, const Channels& block, Real* to) {
  constexpr int W = kLanes<Real>;
  for (int64_t c = 0; c < block.count; ++c) {
    const Real* lane = from + c / W * W * states + c % W;
    Real* row = to + (block.first + c) * states;
    for (int64_t s = 0; s < states; ++s) row[s] = lane[s * W];
  }
}

// The initial state of a sequence, or its gradient.
template <class Real>
MK_INLINE void read_states(const TensorView& from, int64_t n, int64_t states, const Channels& block,
                           Real* to) {
  if (from.data == nullptr) {
    memset(to, 0, states * kChannels * sizeof(Real));
  } else {
    read_states(at<Real>(from, n), from.stride[1], states, block, to);
  }
}

// Rows of tokens lie too far apart for the hardware to see them coming.
template <class T>
MK_INLINE void prefetch_row(const TensorView& t, int64_t batch, int64_t token,
                            const Channels& block) {
  constexpr int64_t kStep = 64 / sizeof(T);
  const T* const row = at<T>(t, batch, token) + block.first;
  for (int64_t c = 0; c < kChannels; c += kStep) prefetch_line(row + c);
}

// Tokens are taken in chunks, so that what is done once a channel does not wait in between what is
// done for each of its states.
constexpr int64_t kChunk = 32;

// delta and u of `count` tokens from t on, and delta's slope or null: [kChunk, kChannels].
template <class T>
MK_INLINE void read_inputs(const SelectiveScanArgs& a, const Channels& block, int64_t batch,
                           int64_t t, int64_t count, Acc<T>* delta, Acc<T>* u, Acc<T>* slope) {
  for (int64_t i = 0; i < count; ++i) {
    const T* const u_row = at<T>(a.u, batch, t + i);
    const T* const delta_row = at<T>(a.delta, batch, t + i);
    for (int64_t c = 0; c < block.count; c += kLanes<Acc<T>>) {
      const int64_t channel = block.first + c, left = block.count - c, to = i * kChannels + c;
      const Delta<Acc<T>> dt(a, delta_row, channel, left);
      store(delta + to, dt.value);
      store(u + to, load_some(u_row + channel, left));
      if (slope != nullptr) store(slope + to, dt.slope);
    }
  }
}

// The states after token t from those before it, from its row of delta and u; and y = C . h, and
// exp(delta A) or null.
template <class T>
MK_INLINE void move_on(const SelectiveScanArgs& a, const Channels& block, int64_t batch, int64_t t,
                       const Acc<T>* delta, const Acc<T>* u, const Acc<T>* A, const Acc<T>* before,
                       Acc<T>* after, Acc<T>* y, Acc<T>* decay) {
  using Real = Acc<T>;
  constexpr int W = kLanes<Real>;
  const int64_t states = a.A.shape[1];
  Real B[kMostStates], C[kMostStates];
  read_row(at<T>(a.B, batch, t, block.group), states, B);
  read_row(at<T>(a.C, batch, t, block.group), states, C);
  for (int64_t c = 0; c < block.count; c += W) {
    const Vec<Real> dt = load(delta + c), input = dt * load(u + c);
    Vec<Real> sum{};
    const int64_t first = c * states;
    for (int64_t k = 0; k < states; ++k) {
      const int64_t i = first + k * W;
      const Vec<Real> factor = exp_or_inf(dt * load(A + i));
      const Vec<Real> next = factor * load(before + i) + input * B[k];
      store(after + i, next);
      if (decay != nullptr) store(decay + i, factor);
      sum += next * C[k];
    }
    store(y + c, sum);
  }
}

}  // namespace
}  // namespace memkernels::scan
