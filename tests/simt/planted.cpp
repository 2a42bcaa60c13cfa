// Small kernels with planted bugs: what the runner and its detectors have to find (test_simt.py).
#include <cmath>
#include <cstdio>
#include <vector>

#include "core/cuda/device.cuh"

namespace {

using namespace memkernels::cuda;

enum Bug {
  kNone,
  // sum
  kMissingBarrier,    // between the warps' sums and their reader
  kProducerAhead,     // one warp writes what all read: hidden where threads run in order
  kUnwrittenRead,     // of shared memory nobody has written
  kDivergentBarrier,  // in two branches
  kEarlyExit,         // of a warp, before a barrier
  kDivergentShuffle,  // lanes of a warp in two places
  // pipeline
  kMissingWait,          // for an asynchronous copy
  kMissingBarrierAfter,  // the wait: others' copies are read
  kMissingBarrierAtEnd,  // the next copy overwrites what is being read
  kMisalignedCopy,
  // beyond the end
  kSharedOverrun,
  kGlobalOverrun,
};

// The sum of n floats by one block.
__global__ void sum(Bug bug, const float* x, int n, float* out) {
  float* const parts = reinterpret_cast<float*>(shared_memory());
  float* const scale = parts + 32;
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, warps = blockDim.x / 32;
  if (bug == kEarlyExit && warp == warps - 1) return;
  if (tid == 0) *scale = 1.f;
  if (bug != kProducerAhead) __syncthreads();
  float s = 0.f;
  const int end = bug == kGlobalOverrun ? n + 64 : n;
  for (int i = tid; i < end; i += blockDim.x) s += x[i] * *scale;
  if (bug == kDivergentShuffle && lane < 7) {
    s += __shfl_xor_sync(kWholeWarp, s, 16);
  } else {
    s += __shfl_xor_sync(kWholeWarp, s, 16);
  }
  for (int lanes = 8; lanes > 0; lanes /= 2) s += __shfl_xor_sync(kWholeWarp, s, lanes);
  if (lane == 0) parts[bug == kSharedOverrun ? warp + 32 : warp] = s;
  if (bug == kDivergentBarrier && warp == 0) {
    __syncthreads();
  } else if (bug != kMissingBarrier) {
    __syncthreads();
  }
  if (warp != 0) return;
  s = lane < warps || bug == kUnwrittenRead ? parts[lane] : 0.f;
  for (int lanes = 16; lanes > 0; lanes /= 2) s += __shfl_xor_sync(kWholeWarp, s, lanes);
  if (lane == 0) *out = s;
}

// Each thread adds up what its neighbour copies, through two stages of shared memory.
__global__ void pipeline(Bug bug, const float* x, int tiles, float* out) {
  const int tid = threadIdx.x, neighbour = (tid + 33) % blockDim.x;
  float* const stages = reinterpret_cast<float*>(shared_memory());
  const int stage_size = 4 * blockDim.x;
  const auto load = [&](int tile) {
    if (tile < tiles) {
      copy_async_16(stages + tile % 2 * stage_size + 4 * tid,
                    x + tile * stage_size + 4 * tid + (bug == kMisalignedCopy));
    }
    commit_copies();
  };
  float s = 0.f;
  load(0);
  for (int tile = 0; tile < tiles; ++tile) {
    load(tile + 1);
    if (bug != kMissingWait) wait_copies<1>();
    if (bug != kMissingBarrierAfter) __syncthreads();
    for (int i = 0; i < 4; ++i) s += stages[tile % 2 * stage_size + 4 * neighbour + i];
    if (bug != kMissingBarrierAtEnd) __syncthreads();
  }
  out[tid] = s;
}

// c = a b for tiles a [16][k] and b [n = 8][k] in shared memory, as the kernels multiply.
template <class T, int kDepth>
__global__ void product(const T* a, const T* b, int depth, float* c) {
  constexpr int kChunk = 16 / sizeof(T);
  T* const left = reinterpret_cast<T*>(shared_memory());
  T* const right = left + 16 * depth;
  const int lane = threadIdx.x;
  for (int i = lane; i < 16 * depth; i += 32) left[i] = a[i];
  for (int i = lane; i < 8 * depth; i += 32) right[i] = b[i];
  __syncwarp();
  float sums[4] = {};
  for (int k = 0; k < depth; k += kDepth) {
    uint32_t x[4], y[2];
    load_matrices_4(x, left + lane % 16 * depth + k + lane / 16 * kChunk);
    load_matrices_2(y, right + lane % 8 * depth + k + lane / 8 % 2 * kChunk);
    if constexpr (sizeof(T) == 4) {
      multiply_tf32(sums, x, y);
    } else if constexpr (__is_same(T, bf16)) {
      multiply_bf16(sums, x, y);
    } else {
      multiply_f16(sums, x, y);
    }
  }
  for (int i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

// The same of b [k][8], whose fragments are transposed on the way.
template <class T>
__global__ void product_transposed(const T* a, const T* b, int depth, float* c) {
  T* const left = reinterpret_cast<T*>(shared_memory());
  T* const right = left + 16 * depth;
  const int lane = threadIdx.x;
  for (int i = lane; i < 16 * depth; i += 32) left[i] = a[i];
  for (int i = lane; i < 8 * depth; i += 32) right[i] = b[i];
  __syncwarp();
  float sums[4] = {};
  for (int k = 0; k < depth; k += 16) {
    uint32_t x[4], both[4];
    load_matrices_4(x, left + lane % 16 * depth + k + lane / 16 * 8);
    load_matrices_4_transposed(both, right + (k + lane % 16) * 8);
    const uint32_t y[2] = {both[0], both[1]};
    if constexpr (__is_same(T, bf16)) {
      multiply_bf16(sums, x, y);
    } else {
      multiply_f16(sums, x, y);
    }
  }
  for (int i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

int report(const char* text, char* message, int size) {
  snprintf(message, size, "%s", text);
  return 1;
}

bool close(float x, float y) { return std::fabs(x - y) <= 1e-3f * std::fabs(y); }

}  // namespace

// Runs a kernel with a bug: 0 if all is well, else why not.
extern "C" __attribute__((visibility("default"))) int simt_planted(const char* kernel, int bug,
                                                                   char* message, int size) {
  const bool is_sum = kernel[0] == 's';
  const unsigned threads = 128;
  const int tiles = 5, count = is_sum ? 1003 : tiles * 4 * threads;
  std::vector<float> x(count + (bug == kMisalignedCopy ? 4 : 0));
  std::vector<float> out(is_sum ? 1 : threads), expected(out.size());
  for (int i = 0; i < count; ++i) {
    x[i] = static_cast<float>(1 + i * 37 % 101) / 101;
    expected[is_sum ? 0 : (i / 4 % threads + threads - 33) % threads] += x[i];
  }
  try {
    if (is_sum) {
      simt::launch("sum", {}, {threads}, 33 * sizeof(float),
                   [&] { sum(static_cast<Bug>(bug), x.data(), count, out.data()); });
    } else {
      simt::launch("pipeline", {}, {threads}, 2 * 16 * threads,
                   [&] { pipeline(static_cast<Bug>(bug), x.data(), tiles, out.data()); });
    }
  } catch (const simt::Error& error) {
    return report(error.what(), message, size);
  }
  for (size_t i = 0; i < out.size(); ++i) {
    if (!close(out[i], expected[i])) return report("wrong numbers", message, size);
  }
  return 0;
}

// c [16][8] = a [16][depth] b, b [8][depth] or, transposed, [depth][8]; dtype 0: float, 1:
// bfloat16, 2: float16.
extern "C" __attribute__((visibility("default"))) void simt_product(int dtype, bool transposed,
                                                                    const void* a, const void* b,
                                                                    int depth, float* c) {
  const size_t shared = 24 * depth * (dtype == 0 ? 4 : 2);
  const auto run = [&](auto type, auto kernel) {
    using T = decltype(type);
    simt::launch("product", {}, {32}, shared,
                 [=] { kernel(static_cast<const T*>(a), static_cast<const T*>(b), depth, c); });
  };
  if (dtype == 0) {
    run(float(), product<float, 8>);
  } else if (dtype == 1) {
    run(bf16(), transposed ? product_transposed<bf16> : product<bf16, 16>);
  } else {
    run(f16(), transposed ? product_transposed<f16> : product<f16, 16>);
  }
}
