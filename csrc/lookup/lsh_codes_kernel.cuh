// code = sum_i [z_i >= 0] 2^(bits - 1 - i); score = S F, with S = sum_i |z_i| and
// F = 1 / prod_i (1 + e_i), e_i = e^(-2 |z_i|): a thread a row. The product is at most 2^30, so
// that it needs no logarithms; what it exceeds 1 by is kept, which loses nothing where every e_i is
// small.
//
// Backward: dz_i = dscore sign(z_i) F (1 + 2 S e_i / (1 + e_i)); z is read once more, from a cache.
//
// Cost: z read once, 8 bytes written a row; backward z read, dz written. An exponential and some 15
// instructions an element, 40 backward: about what an H200 issues while it moves one of bfloat16.
#pragma once

#include "core/cuda/chunk.cuh"
#include "lookup/lsh_codes_cuda.h"

namespace memkernels::lookup::cuda {

template <class T, int kCount>
struct CodeRow {
  const LshCodesParams& p;
  int64_t token, table;

  template <class X>
  __device__ __forceinline__ const X* row(const void* x, const int64_t (&strides)[2]) const {
    return static_cast<const X*>(x) + token * strides[0] + table * strides[1];
  }

  // body(place, values) for each kCount of z.
  template <class Body>
  __device__ __forceinline__ void for_bits(const Body& body) const {
    const T* const z = row<T>(p.z, p.z_strides);
#pragma unroll 4
    for (int i = 0; i < p.bits; i += kCount) {
      body(i, *reinterpret_cast<const Chunk<T, kCount>*>(z + i));
    }
  }
};

__device__ __forceinline__ float decay(float size) {  // e^(-2 size)
  return exp2_fast(size * -2.88539008f);
}

struct Firmness {
  float sum = 0.f, excess = 0.f;
  int code = 0;

  template <class T, int kCount>
  __device__ __forceinline__ explicit Firmness(const CodeRow<T, kCount>& row) {
    row.for_bits([&](int, const Chunk<T, kCount>& z) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        const float x = widen(z.elements[j]), e = decay(fabsf(x));
        sum += fabsf(x);
        excess += e + excess * e;
        code = 2 * code + (x >= 0.f);
      }
    });
  }
  __device__ __forceinline__ float factor() const { return 1.f / (1.f + excess); }
};

// kCount: elements that a thread reads at once.
template <class T, int kCount>
__global__ void __launch_bounds__(kCodeThreads) lsh_codes(const LshCodesParams p) {
  const int64_t index = int64_t{blockIdx.x} * kCodeThreads + threadIdx.x;
  if (index >= p.rows) return;
  const Firmness firmness(CodeRow<T, kCount>{p, index / p.tables, index % p.tables});
  p.codes[index] = firmness.code;
  p.scores[index] = firmness.sum * firmness.factor();
}

template <class T, int kCount>
__global__ void __launch_bounds__(kCodeThreads) lsh_codes_backward(const LshCodesParams p) {
  const int64_t index = int64_t{blockIdx.x} * kCodeThreads + threadIdx.x;
  if (index >= p.rows) return;
  const CodeRow<T, kCount> row{p, index / p.tables, index % p.tables};
  const float dscore = *row.template row<float>(p.dscores, p.dscores_strides);
  const Firmness firmness(row);
  const float factor = firmness.factor(), twice = 2.f * firmness.sum * factor;
  T* const dz = static_cast<T*>(p.dz) + index * p.bits;
  row.for_bits([&](int i, const Chunk<T, kCount>& z) {
    Chunk<T, kCount> grads;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const float x = widen(z.elements[j]), e = decay(fabsf(x));
      // NaN has no sign, and stays.
      const float sign = x > 0.f ? 1.f : x < 0.f ? -1.f : x * 0.f;
      narrow(dscore * sign * (factor + twice * (e / (1.f + e))), grads.elements[j]);
    }
    *reinterpret_cast<Chunk<T, kCount>*>(dz + i) = grads;
  });
}

}  // namespace memkernels::lookup::cuda
