// d = p r_h r_k / sqrt(D), with p = sum(h k w) and r = 1 / sqrt(mean(x^2) + eps) of h and k;
// out = g v, g = sigmoid(sign(d) sqrt(max(|d|, 1e-6))). Some warps share a row; how many, and so
// the order of its sums, depends on its length alone.
//
// Backward, from the same sums: dg = dout . v; dd = dg g (1 - g) / (2 sqrt(|d|)), or 0 where
// |d| < 1e-6. With a = dd r_h r_k / sqrt(D): dh = a (k w - h p r_h^2 / D), dk alike, dw = a h k
// summed over tokens, dv = g dout summed over channels. A block goes through its tokens one by one:
// first along the rows of all channels, for the sums, then down the columns, where a thread has the
// channels of its own. What it adds to dw stays in shared memory, and a second kernel adds up
// blocks.
//
// Cost of an element in bfloat16: h and k read and out written once, and v by C channels, 6 + 2 / C
// bytes; backward h, k and dout read, dh and dk written, 10 + 4 / C bytes, for the second reading
// finds caches. Some 20 and 45 instructions of the 45 and 75 that an H200 issues meanwhile: bound
// by memory.
#pragma once

#include "core/cuda/chunk.cuh"
#include "lookup/engram_gate_cuda.h"

namespace memkernels::lookup::cuda {

// A thread's share of rows, some columns at a time; those behind the end of a row read as zero, and
// are not written. kAligned changes no thread's share, and so no bits.
template <class T, bool kAligned>
struct GateRow {
  static constexpr int kCount = 16 / sizeof(T);
  using Piece = Chunk<T, kCount>;  // as it is loaded: nothing waits for it yet

  const GateParams& p;
  int64_t token;
  int channel;

  template <class X>
  __device__ __forceinline__ Chunk<X, kCount> load(const X* row, int first) const {
    if constexpr (kAligned) {
      return *reinterpret_cast<const Chunk<X, kCount>*>(row + first);
    } else {
      Chunk<X, kCount> columns;
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        columns.elements[i] = first + i < p.dim ? row[first + i] : X{};
      return columns;
    }
  }
  template <class X>
  __device__ __forceinline__ void store(const float (&x)[kCount], X* row, int first) const {
    if constexpr (kAligned) {
      Chunk<X, kCount> columns;
#pragma unroll
      for (int i = 0; i < kCount; i += 2) store_pair(columns.elements + i, x[i], x[i + 1]);
      *reinterpret_cast<Chunk<X, kCount>*>(row + first) = columns;
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (first + i < p.dim) narrow(x[i], row[first + i]);
      }
    }
  }

  __device__ __forceinline__ Piece part(const void* x, const int64_t (&strides)[2],
                                        int first) const {
    return load(static_cast<const T*>(x) + token * strides[0] + channel * strides[1], first);
  }
  __device__ __forceinline__ Piece hidden(int first) const {
    return part(p.hidden, p.hidden_strides, first);
  }
  __device__ __forceinline__ Piece k(int first) const { return part(p.k, p.k_strides, first); }
  __device__ __forceinline__ Piece dout(int first) const {
    return part(p.dout, p.dout_strides, first);
  }
  __device__ __forceinline__ Piece v(int first) const {
    return load(static_cast<const T*>(p.v) + token * p.v_stride, first);
  }
  __device__ __forceinline__ void weight(float (&x)[kCount], int first) const {
    const int64_t offset = channel * p.weight_stride;
    if (p.wide_weight) {
      const auto columns = load(static_cast<const float*>(p.weight) + offset, first);
#pragma unroll
      for (int i = 0; i < kCount; ++i) x[i] = columns.elements[i];
    } else {
      const auto columns = load(static_cast<const T*>(p.weight) + offset, first);
#pragma unroll
      for (int i = 0; i < kCount; ++i) x[i] = widen(columns.elements[i]);
    }
  }
  __device__ __forceinline__ void write(const float (&x)[kCount], void* to, int first) const {
    store(x, static_cast<T*>(to) + (token * p.channels + channel) * p.dim, first);
  }

  // This warp's part of h^2, k^2, h k w and, of a backward, dout v, summed over the row.
  template <int kSums>
  __device__ __forceinline__ void add(float (&sums)[kSums], int warp) const {
    constexpr int kAhead = kSums == 3 ? 2 : 1;  // of each tensor, pieces on their way
    const int lane = threadIdx.x % 32, step = p.row_warps * 32 * kCount;
    for (int first = (warp * 32 + lane) * kCount; first < p.dim; first += kAhead * step) {
      Piece x[kAhead], y[kAhead], grads[kAhead], values[kAhead];
#pragma unroll
      for (int ahead = 0; ahead < kAhead; ++ahead) {
        const int d = first + ahead * step;
        if (d >= p.dim) break;
        x[ahead] = hidden(d);
        y[ahead] = k(d);
        if constexpr (kSums > 3) grads[ahead] = dout(d), values[ahead] = v(d);
      }
#pragma unroll
      for (int ahead = 0; ahead < kAhead; ++ahead) {
        const int d = first + ahead * step;
        if (d >= p.dim) break;
        float w[kCount];
        weight(w, d);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          const float h = widen(x[ahead].elements[i]), key = widen(y[ahead].elements[i]);
          sums[0] += h * h;
          sums[1] += key * key;
          sums[2] += h * key * w[i];
          if constexpr (kSums > 3)
            sums[3] += widen(grads[ahead].elements[i]) * widen(values[ahead].elements[i]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      for (int lanes = 16; lanes > 0; lanes /= 2) {
        sums[i] += __shfl_xor_sync(kWholeWarp, sums[i], lanes);
      }
    }
  }
};

// Of a row; rms inverted.
struct Opening {
  float rms_h, rms_k, root, gate, slope;
  bool clamped;

  __device__ __forceinline__ static float inverse_rms(float squares, const GateParams& p) {
    return 1.f / sqrtf(squares / p.dim + p.eps);
  }

  __device__ __forceinline__ Opening(const float* sums, const GateParams& p) {
    rms_h = inverse_rms(sums[0], p);
    rms_k = inverse_rms(sums[1], p);
    const float d = sums[2] * rms_h * rms_k * p.scale, size = fabsf(d), least = 1e-6f;
    clamped = size < least;
    root = sqrtf(clamped ? least : size);
    const float e = expf(-root);
    slope = e / ((1.f + e) * (1.f + e));
    gate = (float_to_bits(d) >> 31 ? e : 1.f) / (1.f + e);
    if (d == 0.f && !p.copy_sign) gate = 0.5f;
  }
};

template <class T, bool kAligned>
__global__ void __launch_bounds__(kGateThreads) gate(const GateParams p) {
  using Row = GateRow<T, kAligned>;
  constexpr int kCount = Row::kCount;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t index = int64_t{blockIdx.x} * (kGateWarps / p.row_warps) + warp / p.row_warps;
  const bool used = index < p.tokens * p.channels;
  const Row row{p, index / p.channels, static_cast<int>(index % p.channels)};
  float sums[3] = {};
  if (used) row.add(sums, warp % p.row_warps);
  if (p.row_warps > 1) {
    const auto all = reinterpret_cast<float*>(shared_memory());  // [warps, 3]
    for (int i = 0; i < 3 && lane == 0; ++i) all[warp * 3 + i] = sums[i];
    __syncthreads();
    const int first = warp / p.row_warps * p.row_warps;
    for (int i = 0; i < 3; ++i) {
      sums[i] = 0.f;
      for (int w = first; w < first + p.row_warps; ++w) sums[i] += all[w * 3 + i];
    }
  }
  if (!used) return;
  const float gate = Opening(sums, p).gate;
#pragma unroll 2
  for (int d = (warp % p.row_warps * 32 + lane) * kCount; d < p.dim;
       d += p.row_warps * 32 * kCount) {
    const auto value = row.v(d);
    float x[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = gate * widen(value.elements[i]);
    row.write(x, p.out, d);
  }
}

// What the gradients of a row are made of.
struct alignas(16) Closing {
  float gate, factor, along_h, along_k;
};

template <class T, bool kAligned>
__global__ void __launch_bounds__(kGateThreads, 3) gate_backward(const GateParams p) {
  using Row = GateRow<T, kAligned>;
  constexpr int kCount = Row::kCount;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto all = reinterpret_cast<float*>(shared_memory());  // [C, row_warps, 4]
  const auto closings = reinterpret_cast<Closing*>(all + p.channels * p.row_warps * 4);  // [C]
  const int64_t begin = int64_t{blockIdx.x} * p.block_tokens;
  const int64_t end = p.tokens - begin < p.block_tokens ? p.tokens : begin + p.block_tokens;
  for (int64_t t = begin; t < end; ++t) {
    for (int c = warp / p.row_warps; c < p.channels; c += kGateWarps / p.row_warps) {
      float sums[4] = {};
      Row{p, t, c}.add(sums, warp % p.row_warps);
      for (int i = 0; i < 4 && lane == 0; ++i) {
        all[(c * p.row_warps + warp % p.row_warps) * 4 + i] = sums[i];
      }
    }
    __syncthreads();
    for (int c = threadIdx.x; c < p.channels; c += kGateThreads) {
      float sums[4] = {};
      for (int w = 0; w < p.row_warps; ++w) {
        for (int i = 0; i < 4; ++i) sums[i] += all[(c * p.row_warps + w) * 4 + i];
      }
      const Opening o(sums, p);
      const float dd = o.clamped ? 0.f : sums[3] * o.slope / (2.f * o.root);
      closings[c] = {o.gate, dd * o.rms_h * o.rms_k * p.scale, sums[2] * o.rms_h * o.rms_h / p.dim,
                     sums[2] * o.rms_k * o.rms_k / p.dim};
    }
    __syncthreads();
    for (int d = threadIdx.x * kCount; d < p.dim; d += kGateThreads * kCount) {
      float dv[kCount] = {};
      for (int c = 0; c < p.channels; ++c) {
        const Row row{p, t, c};
        const Closing closing = closings[c];
        const auto grad = row.dout(d), x = row.hidden(d), y = row.k(d);
        float w[kCount], h[kCount], key[kCount], result[kCount];
        row.weight(w, d);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          dv[i] += widen(grad.elements[i]) * closing.gate;
          h[i] = widen(x.elements[i]);
          key[i] = widen(y.elements[i]);
        }
        if (p.dhidden) {
#pragma unroll
          for (int i = 0; i < kCount; ++i) {
            result[i] = closing.factor * (key[i] * w[i] - h[i] * closing.along_h);
          }
          row.write(result, p.dhidden, d);
        }
        if (p.dk) {
#pragma unroll
          for (int i = 0; i < kCount; ++i) {
            result[i] = closing.factor * (h[i] * w[i] - key[i] * closing.along_k);
          }
          row.write(result, p.dk, d);
        }
        if (p.parts) {
          const int64_t offset = int64_t{c} * p.dim;
          float* const whole = p.parts + int64_t{blockIdx.x} * p.channels * p.dim + offset;
          float* const growing =
              p.parts_in_shared ? reinterpret_cast<float*>(closings + p.channels) + offset : whole;
          Chunk<float, kCount> sum{};
          if (t > begin) sum = row.load(growing, d);
#pragma unroll
          for (int i = 0; i < kCount; ++i) sum.elements[i] += closing.factor * (h[i] * key[i]);
          row.store(sum.elements, t + 1 < end ? growing : whole, d);
        }
      }
      if (p.dv) Row{p, t, 0}.store(dv, static_cast<T*>(p.dv) + t * p.dim, d);
    }
  }
}

// A lane a number, of which each warp adds up every eighth part.
template <class Weight>
__global__ void __launch_bounds__(kGateThreads) add_gate_parts(const GatePartsParams p) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t i = int64_t{blockIdx.x} * 32 + lane;
  float sum = 0.f;
  if (i < p.numbers) {
#pragma unroll 8
    for (int part = warp; part < p.num_parts; part += kGateWarps) {
      sum += p.parts[part * p.numbers + i];
    }
  }
  const auto all = reinterpret_cast<float*>(shared_memory());  // [warps, lanes]
  all[threadIdx.x] = sum;
  __syncthreads();
  if (warp > 0 || i >= p.numbers) return;
  sum = 0.f;
  for (int w = 0; w < kGateWarps; ++w) sum += all[w * 32 + lane];
  narrow(sum, static_cast<Weight*>(p.sums)[i]);
}

}  // namespace memkernels::lookup::cuda
