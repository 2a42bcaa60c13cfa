// elu1: x + 1 or e^x; relu2: max(x, 0)^2. taylor2: 1, x_i / D^(1/4), and x_i x_j / sqrt(D) for
// i <= j, over sqrt(2) where i = j. dpfp: r_i r_(i - j) for j = 1 to nu, r = max([x, -x], 0),
// indices modulo 2 D.
//
// Elements: a thread has 16 bytes. dpfp: a thread has 16 bytes of a row for every j, whose
// neighbours are parts of two chunks that it holds as well, at offsets known when it is compiled.
// taylor2: a thread has a feature, or the gradient of an element, of four rows at a time, which lie
// side by side in shared memory.
//
// Cost: x read and the features written, backward x and their gradient read and that of x written,
// once: 4, 2 + 4 nu and 2 + 2 features / D bytes an element in bfloat16. Up to ten instructions a
// feature, where an H200 issues some 13 while it writes one: bound by memory, taylor2 nearly as
// much by shared memory.
#pragma once

#include "core/cuda/chunk.cuh"
#include "scan/feature_map_cuda.h"

namespace memkernels::scan::cuda {

template <class T>
__device__ __forceinline__ const T* map_row(const MapRows& rows, int64_t row) {
  int64_t offset = 0;
  for (int i = rows.num_dims - 1; i > 0; --i) {
    offset += row % rows.shape[i] * rows.stride[i];
    row /= rows.shape[i];
  }
  return static_cast<const T*>(rows.data) + offset + row * rows.stride[0];
}

// index / n, and what is left.
struct Division {
  int64_t quotient, rest;
};
__device__ __forceinline__ Division divide(int64_t index, int64_t n) {
  if (((index | n) >> 32) != 0) return {index / n, index % n};
  const auto x = static_cast<uint32_t>(index), y = static_cast<uint32_t>(n);
  return {x / y, x % y};
}

// ---- elements ----

template <class T, int kCount>
__global__ void __launch_bounds__(kMapThreads) map_elements(const FeatureMapParams p) {
  const int64_t index = int64_t{blockIdx.x} * kMapThreads + threadIdx.x, chunks = p.dim / kCount;
  if (index >= p.rows * chunks) return;
  const Division of = divide(index, chunks);
  float x[kCount], y[kCount];
  load(map_row<T>(p.x, of.quotient) + of.rest * kCount, x);
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    const float positive = relu(x[e]);
    y[e] = p.relu ? positive * positive : x[e] > 0.f ? x[e] + 1.f : expf(x[e]);
  }
  store(y, static_cast<T*>(p.to) + index * kCount);
}

template <class T, int kCount>
__global__ void __launch_bounds__(kMapThreads) map_elements_backward(const FeatureMapParams p) {
  const int64_t index = int64_t{blockIdx.x} * kMapThreads + threadIdx.x, chunks = p.dim / kCount;
  if (index >= p.rows * chunks) return;
  const Division of = divide(index, chunks);
  float x[kCount], dx[kCount];
  load(map_row<T>(p.x, of.quotient) + of.rest * kCount, x);
  load(map_row<T>(p.dout, of.quotient) + of.rest * kCount, dx);
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    dx[e] *= p.relu ? 2.f * relu(x[e]) : x[e] > 0.f ? 1.f : expf(x[e]);
  }
  store(dx, static_cast<T*>(p.to) + index * kCount);
}

// ---- products of neighbours ----

// The chunks of r.
template <class T, int kCount>
struct Ring {
  const T* x;
  int half;  // chunks of x

  __device__ __forceinline__ int before(int chunk) const {
    return chunk > 0 ? chunk - 1 : 2 * half - 1;
  }
  __device__ __forceinline__ int after(int chunk) const {
    return chunk + 1 < 2 * half ? chunk + 1 : 0;
  }
  __device__ __forceinline__ void read(int chunk, float (&r)[kCount]) const {
    const bool negative = chunk >= half;
    load(x + int64_t{negative ? chunk - half : chunk} * kCount, r);
#pragma unroll
    for (int e = 0; e < kCount; ++e) r[e] = relu(negative ? -r[e] : r[e]);
  }
};

// Element e of two chunks side by side, e known when it is compiled.
template <int kCount>
__device__ __forceinline__ float of_two(const float (&first)[kCount], const float (&second)[kCount],
                                        int e) {
  return e < kCount ? first[e < kCount ? e : 0] : second[e < kCount ? 0 : e - kCount];
}

template <class T, int kCount>
__global__ void __launch_bounds__(kMapThreads) multiply_neighbours(const FeatureMapParams p) {
  const int64_t index = int64_t{blockIdx.x} * kMapThreads + threadIdx.x;
  const int half = static_cast<int>(p.dim / kCount);
  const Division of = divide(index, 2 * half);
  if (of.quotient >= p.rows) return;
  const Ring<T, kCount> ring{map_row<T>(p.x, of.quotient), half};
  int chunk = static_cast<int>(of.rest);
  T* const to = static_cast<T*>(p.to) + of.quotient * p.features + int64_t{chunk} * kCount;
  float mine[kCount], near[kCount], far[kCount];
  ring.read(chunk, mine);
#pragma unroll
  for (int e = 0; e < kCount; ++e) far[e] = mine[e];
  for (int64_t back = 0; back < p.nu; back += kCount) {
#pragma unroll
    for (int e = 0; e < kCount; ++e) near[e] = far[e];
    chunk = ring.before(chunk);
    ring.read(chunk, far);
#pragma unroll
    for (int s = 1; s <= kCount; ++s) {
      if (back + s > p.nu) break;
      float y[kCount];
#pragma unroll
      for (int e = 0; e < kCount; ++e) y[e] = mine[e] * of_two(far, near, e + kCount - s);
      store(y, to + (back + s - 1) * 2 * p.dim);
    }
  }
}

// The gradient of a chunk of r.
template <class T, int kCount>
__device__ __forceinline__ void gradient_of_neighbours(const FeatureMapParams& p,
                                                       const Ring<T, kCount>& ring, const T* dout,
                                                       int chunk, float (&sums)[kCount]) {
  float near_below[kCount], below[kCount], near_above[kCount], above[kCount];
  ring.read(chunk, below);
#pragma unroll
  for (int e = 0; e < kCount; ++e) above[e] = below[e], sums[e] = 0.f;
  int down = chunk, up = chunk;
  for (int64_t away = 0; away < p.nu; away += kCount) {
    const int near = up;
    down = ring.before(down);
    up = ring.after(up);
#pragma unroll
    for (int e = 0; e < kCount; ++e) near_below[e] = below[e], near_above[e] = above[e];
    ring.read(down, below);
    ring.read(up, above);
#pragma unroll
    for (int s = 1; s <= kCount; ++s) {
      if (away + s > p.nu) break;
      const T* const row = dout + (away + s - 1) * 2 * p.dim;
      float mine[kCount], first[kCount], second[kCount];
      load(row + int64_t{chunk} * kCount, mine);
      load(row + int64_t{near} * kCount, first);
      load(row + int64_t{up} * kCount, second);
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        sums[e] += mine[e] * of_two(below, near_below, e + kCount - s);
        sums[e] += of_two(first, second, e + s) * of_two(near_above, above, e + s);
      }
    }
  }
}

template <class T, int kCount>
__global__ void __launch_bounds__(kMapThreads)
    multiply_neighbours_backward(const FeatureMapParams p) {
  const int64_t index = int64_t{blockIdx.x} * kMapThreads + threadIdx.x;
  const int half = static_cast<int>(p.dim / kCount);
  const Division of = divide(index, half);
  if (of.quotient >= p.rows) return;
  const int chunk = static_cast<int>(of.rest);
  const Ring<T, kCount> ring{map_row<T>(p.x, of.quotient), half};
  const T* const dout = map_row<T>(p.dout, of.quotient);
  float x[kCount], up[kCount], down[kCount];
  gradient_of_neighbours(p, ring, dout, chunk, up);
  gradient_of_neighbours(p, ring, dout, chunk + half, down);
  load(ring.x + int64_t{chunk} * kCount, x);
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    up[e] = (x[e] <= 0.f ? 0.f : up[e]) - (x[e] >= 0.f ? 0.f : down[e]);
  }
  store(up, static_cast<T*>(p.to) + index * kCount);
}

// ---- products of pairs ----

struct alignas(16) FourRows {
  float x[kMapRows];
};

// An element of four rows; zeros for rows that are not there.
template <class T>
__device__ __forceinline__ FourRows element_of(const T* const (&rows)[kMapRows], int64_t i) {
  FourRows all;
#pragma unroll
  for (int row = 0; row < kMapRows; ++row) all.x[row] = rows[row] ? widen(rows[row][i]) : 0.f;
  return all;
}

template <class T>
__device__ __forceinline__ void rows_of_group(const MapRows& rows, int64_t group, int64_t count,
                                              const T* (&found)[kMapRows]) {
#pragma unroll
  for (int i = 0; i < kMapRows; ++i) {
    const int64_t row = group * kMapRows + i;
    found[i] = row < count ? map_row<T>(rows, row) : nullptr;
  }
}

// Elements [0, width) of a block's groups of rows, into [groups, width].
template <class T>
__device__ __forceinline__ void stage_rows(const MapRows& rows, int64_t first_group, int groups,
                                           int64_t count, int width, FourRows* to) {
  const int per_group = blockDim.x / groups, group = threadIdx.x / per_group;
  if (group >= groups) return;
  const T* found[kMapRows];
  rows_of_group(rows, first_group + group, count, found);
  for (int i = threadIdx.x % per_group; i < width; i += per_group) {
    to[group * width + i] = element_of(found, i);
  }
}

// Where the products of x_i and what follows it begin.
__device__ __forceinline__ int first_product(int dim, int i) {
  return 1 + dim + i * dim - i * (i - 1) / 2;
}

// A feature, which is factor * x_i * x_j, x_-1 being 1.
struct Product {
  int i, j;
  float factor;

  __device__ __forceinline__ Product(const FeatureMapParams& p, int feature) {
    const int dim = static_cast<int>(p.dim);
    if (feature <= dim) {
      i = -1;
      j = feature - 1;
      factor = feature > 0 ? p.first : 1.f;
      return;
    }
    // The root may be off by its rounding.
    const float width = 2.f * dim + 1.f, rest = static_cast<float>(feature - 1 - dim);
    const float square = width * width - 8.f * rest;
    i = static_cast<int>(0.5f * (width - sqrtf(square > 0.f ? square : 0.f)));
    i = i < dim ? i : dim - 1;
    while (first_product(dim, i) > feature) --i;
    while (i + 1 < dim && first_product(dim, i + 1) <= feature) ++i;
    j = i + feature - first_product(dim, i);
    factor = i == j ? p.second * p.diagonal : p.second;
  }
};

template <class T>
__global__ void __launch_bounds__(kMapThreads) multiply_pairs(const FeatureMapParams p) {
  const auto all = reinterpret_cast<FourRows*>(shared_memory());  // [groups, dim]
  const int dim = static_cast<int>(p.dim), features = static_cast<int>(p.features);
  const int stretches = (features + kMapFeatures - 1) / kMapFeatures;
  const int64_t first_group = int64_t{blockIdx.x / stretches} * p.groups;
  const int begin = blockIdx.x % stretches * kMapFeatures;
  const int end = features - begin < kMapFeatures ? features : begin + kMapFeatures;
  stage_rows<T>(p.x, first_group, p.groups, p.rows, dim, all);
  __syncthreads();
  for (int feature = begin + threadIdx.x; feature < end; feature += blockDim.x) {
    const Product product(p, feature);
    for (int group = 0; group < p.groups; ++group) {
      const FourRows* const x = all + group * dim;
      FourRows left{{1.f, 1.f, 1.f, 1.f}}, right = left;
      if (product.i >= 0) left = x[product.i];
      if (product.j >= 0) right = x[product.j];
      const int64_t row = (first_group + group) * kMapRows;
      T* const to = static_cast<T*>(p.to) + row * p.features + feature;
#pragma unroll
      for (int i = 0; i < kMapRows; ++i) {
        if (row + i >= p.rows) break;
        narrow(left.x[i] * product.factor * right.x[i], to[i * p.features]);
      }
    }
  }
}

// The gradient of x_i of four rows; `dout` gives a feature's.
template <class Gradient>
__device__ __forceinline__ FourRows gradient_of_pairs(const FeatureMapParams& p, const FourRows* x,
                                                      int i, const Gradient& dout) {
  const int dim = static_cast<int>(p.dim);
  FourRows sums{};
  int feature = 1 + dim + i;
#pragma unroll 4
  for (int j = 0; j < dim; ++j) {
    const FourRows grad = dout(feature), other = x[j];
    const float factor = i == j ? 2.f * p.diagonal : 1.f;
#pragma unroll
    for (int row = 0; row < kMapRows; ++row) sums.x[row] += factor * grad.x[row] * other.x[row];
    feature += j < i ? dim - 1 - j : 1;
  }
  const FourRows grad = dout(1 + i);
#pragma unroll
  for (int row = 0; row < kMapRows; ++row) {
    sums.x[row] = p.second * sums.x[row] + p.first * grad.x[row];
  }
  return sums;
}

template <class T>
__global__ void __launch_bounds__(kMapThreads) multiply_pairs_backward(const FeatureMapParams p) {
  const int dim = static_cast<int>(p.dim), features = static_cast<int>(p.features);
  const int64_t first_group = int64_t{blockIdx.x} * p.groups;
  const auto all = reinterpret_cast<FourRows*>(shared_memory());  // [groups, dim]
  FourRows* const grads = all + p.groups * dim;                   // [groups, features], if staged
  stage_rows<T>(p.x, first_group, p.groups, p.rows, dim, all);
  if (p.staged) stage_rows<T>(p.dout, first_group, p.groups, p.rows, features, grads);
  __syncthreads();
  for (int index = threadIdx.x; index < p.groups * dim; index += blockDim.x) {
    const int group = index / dim, i = index % dim;
    const int64_t row = (first_group + group) * kMapRows;
    if (row >= p.rows) break;
    FourRows dx;
    if (p.staged) {
      const FourRows* const mine = grads + group * features;
      dx = gradient_of_pairs(p, all + group * dim, i, [&](int f) { return mine[f]; });
    } else {
      const T* rows[kMapRows];
      rows_of_group(p.dout, first_group + group, p.rows, rows);
      dx = gradient_of_pairs(p, all + group * dim, i, [&](int f) { return element_of(rows, f); });
    }
    T* const to = static_cast<T*>(p.to) + row * dim + i;
#pragma unroll
    for (int r = 0; r < kMapRows; ++r) {
      if (row + r < p.rows) narrow(dx.x[r], to[r * p.dim]);
    }
  }
}

}  // namespace memkernels::scan::cuda
