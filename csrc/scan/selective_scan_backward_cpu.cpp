// With a = exp(delta A) and h of the tokens before and after, backwards in time:
//   dy = dout silu(z), dz = dout y silu'(z), dD += dy u, dC = sum over channels of dy h,
//   dh += C dy, dB = sum over channels of dh delta u, du = D dy + delta (B . dh),
//   dA += delta dh a h', ddelta = u (B . dh) + A . (dh a h'), and dh a is what h' gets.
//
// A first sweep keeps the states at the starts of chunks, so that each chunk's states and
// exponentials can be computed anew, last chunk first, and stay in the second cache. 2 D S
// exponentials a token. Gradients of weights are summed within chunks first: one long chain would
// round more.
#include "scan/selective_scan_cpu.h"

#include "core/cpu/arena.h"

namespace memkernels::scan {
namespace {

template <class Real>
constexpr Real kLargest = static_cast<Real>(sizeof(Real) == 4 ? __FLT_MAX__ : __DBL_MAX__);

template <class T>
struct Backward {
  using Real = Acc<T>;
  static constexpr int W = kLanes<Real>;

  // A worker's scratch. `size` is that of the states of a block.
  struct Scratch {
    int64_t size;
    Real *A, *dh;
    Real *decay, *h;                   // [kChunk, size]: exp(delta A), and h after each token
    Real *u, *delta, *slope, *y, *dy;  // [kChunk, kChannels]
    Real *chunk_sums, *sums;           // dA [size], dD and ddelta_bias [kChannels]
    Real *dB, *dC;                     // of a token [S, lanes]
    Real* starts;                      // [chunks, size], to the end

    Scratch(void* base, int64_t states) : size(states * kChannels) {
      Arena arena{static_cast<char*>(base)};
      const int64_t padded = round_up(states, W);
      A = arena.take<Real>(size);
      dh = arena.take<Real>(size);
      decay = arena.take<Real>(kChunk * size);
      h = arena.take<Real>(kChunk * size);
      u = arena.take<Real>(kChunk * kChannels);
      delta = arena.take<Real>(kChunk * kChannels);
      slope = arena.take<Real>(kChunk * kChannels);
      y = arena.take<Real>(kChunk * kChannels);
      dy = arena.take<Real>(kChunk * kChannels);
      chunk_sums = arena.take<Real>(num_sums());
      sums = arena.take<Real>(num_sums());
      dB = arena.take<Real>(padded * W);
      dC = arena.take<Real>(padded * W);
      starts = arena.take<Real>(0);
    }
    int64_t num_sums() const { return size + 2 * kChannels; }
  };

  const SelectiveScanArgs& a;
  const SelectiveScanGrads& g;
  const SelectiveScanParts& parts;
  const Channels& block;
  const Scratch& s;
  const int64_t states;

  static size_t scratch_bytes(int64_t states, int64_t longest) {
    const Scratch s(nullptr, states);
    return reinterpret_cast<size_t>(s.starts + (longest + kChunk - 1) / kChunk * s.size);
  }

  static void backward(const SelectiveScanArgs& a, const SelectiveScanGrads& g,
                       const SelectiveScanParts& parts, const Channels& block, int64_t begin,
                       int64_t end, void* scratch) {
    const Scratch s(scratch, a.A.shape[1]);
    const Backward self{a, g, parts, block, s, a.A.shape[1]};
    read_states(at<Real>(a.A, 0), a.A.stride[0], self.states, block, s.A);
    memset(s.sums, 0, s.num_sums() * sizeof(Real));
    for (int64_t n = begin; n < end; ++n) self.sequence(n);
    if (parts.dA != nullptr) {
      write_states(s.sums, self.states, block, static_cast<Real*>(parts.dA));
    }
    self.write_channels(s.sums + s.size, parts.dD);
    self.write_channels(s.sums + s.size + kChannels, parts.ddelta_bias);
  }

  void write_channels(const Real* from, void* to) const {
    if (to == nullptr) return;
    memcpy(static_cast<Real*>(to) + block.first, from, block.count * sizeof(Real));
  }

  void sequence(int64_t n) const {
    const Span span = a.sequences[n];
    const int64_t chunks = (span.end - span.begin + kChunk - 1) / kChunk;
    if (chunks > 0) read_states(a.initial_state, n, states, block, s.starts);
    for (int64_t chunk = 0; chunk + 1 < chunks; ++chunk) {
      const int64_t t = span.begin + chunk * kChunk;
      Real* const next = s.starts + (chunk + 1) * s.size;
      memcpy(next, next - s.size, s.size * sizeof(Real));
      read_inputs<T>(a, block, span.batch, t, kChunk, s.delta, s.u, nullptr);
      for (int64_t i = 0; i < kChunk; ++i) {
        const int64_t row = i * kChannels;
        prefetch_row<T>(a.u, span.batch, t + kChunk + i, block);
        prefetch_row<T>(a.delta, span.batch, t + kChunk + i, block);
        move_on<T>(a, block, span.batch, t + i, s.delta + row, s.u + row, s.A, next, next,
                   s.y + row, nullptr);
      }
    }
    read_states(g.dstate, n, states, block, s.dh);
    for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
      const int64_t t = span.begin + chunk * kChunk;
      const int64_t count = span.end - t < kChunk ? span.end - t : kChunk;
      const Real* const start = s.starts + chunk * s.size;
      const auto before = [&](int64_t i) { return i == 0 ? start : s.h + (i - 1) * s.size; };
      read_inputs<T>(a, block, span.batch, t, count, s.delta, s.u, s.slope);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t row = i * kChannels;
        prefetch_row<T>(g.dout, span.batch, t + i, block);
        if (a.z.data != nullptr) prefetch_row<T>(a.z, span.batch, t + i, block);
        move_on<T>(a, block, span.batch, t + i, s.delta + row, s.u + row, s.A, before(i),
                   s.h + i * s.size, s.y + row, s.decay + i * s.size);
      }
      for (int64_t i = 0; i < count; ++i) through_gate(span.batch, t + i, i);
      memset(s.chunk_sums, 0, s.num_sums() * sizeof(Real));
      for (int64_t i = count - 1; i >= 0; --i) {
        if (chunk > 0) {
          prefetch_row<T>(a.u, span.batch, t + i - kChunk, block);
          prefetch_row<T>(a.delta, span.batch, t + i - kChunk, block);
        }
        walk_back(span.batch, t + i, i, before(i));
      }
      for (int64_t i = 0; i < s.num_sums(); i += W) {
        store(s.sums + i, load(s.sums + i) + load(s.chunk_sums + i));
      }
    }
    if (g.dinitial_state.data != nullptr) {
      write_states(s.dh, states, block, at<Real>(g.dinitial_state, n));
    }
  }

  // Token t, the i-th of a chunk, from C . h: dy, and dz.
  MK_INLINE void through_gate(int64_t batch, int64_t t, int64_t i) const {
    const T* dout = at<T>(g.dout, batch, t);
    const T* z = row_of<T>(a.z, batch, t);
    T* dz = row_of<T>(g.dz, batch, t);
    const Real* D = static_cast<const Real*>(a.D.data);
    for (int64_t c = 0; c < block.count; c += W) {
      const int64_t channel = block.first + c, left = block.count - c, at_c = i * kChannels + c;
      Vec<Real> dy = load_some(dout + channel, left);
      if (z != nullptr) {
        const Vec<Real> gate = load_some(z + channel, left), open = sigmoid<Real>(gate);
        if (dz != nullptr) {
          Vec<Real> y = load(s.y + at_c);
          if (D != nullptr) y += load_some(D + channel, left) * load(s.u + at_c);
          store_some(dz + channel, left, dy * y * open * (1 + gate * (1 - open)));
        }
        dy *= gate * open;
      }
      store(s.dy + at_c, dy);
    }
  }

  MK_INLINE void walk_back(int64_t batch, int64_t t, int64_t i, const Real* before) const {
    const Real* D = static_cast<const Real*>(a.D.data);
    T *const du_row = row_of<T>(g.du, batch, t), *const ddelta_row = row_of<T>(g.ddelta, batch, t);
    // A of -inf decays to an exact 0, which nothing can change.
    const Vec<Real> least = splat(-kLargest<Real>);
    Real B[kMostStates], C[kMostStates];
    read_row(at<T>(a.B, batch, t, block.group), states, B);
    read_row(at<T>(a.C, batch, t, block.group), states, C);
    memset(s.dB, 0, round_up(states, W) * W * sizeof(Real));
    memset(s.dC, 0, round_up(states, W) * W * sizeof(Real));
    for (int64_t c = 0; c < block.count; c += W) {
      const int64_t channel = block.first + c, left = block.count - c, at_c = i * kChannels + c;
      const Vec<Real> u = load(s.u + at_c), dt = load(s.delta + at_c), dy = load(s.dy + at_c);
      const Vec<Real> scaled = dt * u;
      const Real *const A = s.A + c * states, *const from = before + c * states;
      const Real* const decay = s.decay + i * s.size + c * states;
      const Real* const h = s.h + i * s.size + c * states;
      Real *const dh = s.dh + c * states, *const dA = s.chunk_sums + c * states;
      Vec<Real> along_B{}, along_A{};
      for (int64_t k = 0; k < states * W; k += W) {
        const Vec<Real> dnext = load(dh + k) + dy * C[k / W];
        store(s.dC + k, load(s.dC + k) + dy * load(h + k));
        store(s.dB + k, load(s.dB + k) + dnext * scaled);
        along_B += dnext * B[k / W];
        const Vec<Real> dbefore = dnext * load(decay + k), dpower = dbefore * load(from + k);
        store(dh + k, dbefore);
        store(dA + k, load(dA + k) + dpower * dt);
        along_A += dpower * vmax(load(A + k), least);
      }
      Vec<Real> du = dt * along_B;
      if (D != nullptr) du += load_some(D + channel, left) * dy;
      const Vec<Real> ddelta = (u * along_B + along_A) * load(s.slope + at_c);
      Real *const dD = s.chunk_sums + s.size + c, *const dbias = dD + kChannels;
      store(dD, load(dD) + dy * u);
      store(dbias, load(dbias) + ddelta);
      if (du_row != nullptr) store_some(du_row + channel, left, du);
      if (ddelta_row != nullptr) store_some(ddelta_row + channel, left, ddelta);
    }
    const int64_t row = (batch * a.B.shape[1] + t) * a.B.shape[2] + block.group;
    add_lanes(s.dB, parts.dB, row);
    add_lanes(s.dC, parts.dC, row);
  }

  // To a row of [B, T, G, S], the sums over lanes of [S, lanes]; destroys them.
  MK_INLINE void add_lanes(Real* lanes, void* to, int64_t row) const {
    if (to == nullptr) return;
    Real* const out = static_cast<Real*>(to) + row * states;
    for (int64_t k = 0; k < states; k += W) {
      Vec<Real> v[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) v[i] = load(lanes + (k + i) * W);
      Vec<Real> sums = sum_each<Real>(v);
      if (parts.add) sums += load_some(out + k, states - k);
      store_some(out + k, states - k, sums);
    }
  }

  template <class To>
  static void add(To* to, const Real* parts, int64_t stride, int64_t num_parts, int64_t begin,
                  int64_t end) {
    for (int64_t i = begin; i < end; i += W) {
      Vec<Real> sum{};
      for (int64_t p = 0; p < num_parts; ++p) sum += load_some(parts + p * stride + i, end - i);
      store_some(to + i, end - i, sum);
    }
  }

  static void add_parts(const TensorView& to, const void* parts, int64_t num_parts, int64_t begin,
                        int64_t end) {
    int64_t stride = 1;
    for (int i = 0; i < to.ndim; ++i) stride *= to.shape[i];
    const Real* const from = static_cast<const Real*>(parts);
    if (to.dtype == Dtype::f32 || to.dtype == Dtype::f64) {
      add(static_cast<Real*>(to.data), from, stride, num_parts, begin, end);
    } else {
      add(static_cast<T*>(to.data), from, stride, num_parts, begin, end);
    }
  }
};

template <class T>
constexpr SelectiveScanBackwardKernel kernel_for() {
  using S = Backward<T>;
  return {S::scratch_bytes, S::backward, S::add_parts};
}

}  // namespace

namespace cpu::MEMKERNELS_ISA {

SelectiveScanBackwardKernel selective_scan_backward_kernel(Dtype dtype) {
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
