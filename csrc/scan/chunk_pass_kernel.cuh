// States from segment to segment of a long sequence:
//   S after = M S before + P
// with P what the segment's tokens write, and M what they make of a state, [K, K] for the delta
// rule, else the product of decays; of gradients, back, M^T. In float32.
//
// A block a sequence, value head and 32 columns of V; cost: 2 K^2 V flops a segment and head, at
// most some K / 3000 of what its tokens take; M as much as K more columns of V.
#pragma once

#include "scan/chunk_kernel.cuh"

namespace memkernels::scan::cuda {

inline constexpr int kPassThreads = 256;
inline constexpr int kPassColumns = 32;

template <int kTokens>
__global__ void __launch_bounds__(kPassThreads, 1) pass_states(const PassParams p) {
  constexpr int kRows = 4;  // of M at a time
  const ChunkParams& c = p.c;
  const int blocks = (c.values + kPassColumns - 1) / kPassColumns;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = kPassThreads / 32;
  const int value = static_cast<int>(blockIdx.x % blocks) * kPassColumns + lane;
  const int head = static_cast<int>(blockIdx.x / blocks % c.heads);
  const int64_t n = blockIdx.x / blocks / c.heads;
  const Span span = span_of(c.sequences, n);
  const int64_t count = segments_of(p.segment, span.end - span.begin);
  const int64_t first = first_segment(c, p.segment, n), first_number = first_chunk<kTokens>(c, n);

  float* before = reinterpret_cast<float*>(shared_memory());  // [K][kPassColumns] S
  float* after = before + c.keys * kPassColumns;
  float* const totals = after + c.keys * kPassColumns;
  for (int k = warp; k < c.keys; k += warps) {
    const bool inside = p.initial_state.data && value < c.values;
    before[k * kPassColumns + lane] =
        inside ? row_at<float>(p.initial_state, n, k, head)[value] : 0.f;
  }
  for (int64_t i = 0; i + 1 < count; ++i) {
    const int64_t number = first + (p.back ? count - 1 - i : i), unit = number * c.heads + head;
    const int64_t chunks = p.segment / kTokens;
    const int64_t begin = (number - first) * chunks;
    const int64_t end = number - first + 1 < count
                            ? begin + chunks
                            : (span.end - span.begin + kTokens - 1) / kTokens;
    for (int k = threadIdx.x; !p.transitions && k < c.keys; k += kPassThreads) {
      float total = 1.f;
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        total *= c.prepared.totals[((first_number + chunk) * c.heads + head) * c.key_row + k];
      }
      totals[k] = total;
    }
    __syncthreads();
    const bool from_zero = i == 0 && !p.initial_state.data;
    const float* const m = p.transitions + unit * c.keys * c.keys;
    const int64_t row = p.back ? 1 : c.keys, column = p.back ? c.keys : 1;
    for (int o = warp * kRows; o < c.keys; o += warps * kRows) {
      float sums[kRows] = {};
      if (p.transitions && !from_zero) {
        for (int k = 0; k < c.keys; ++k) {
          const float x = before[k * kPassColumns + lane];
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            if (o + r < c.keys) sums[r] += m[(o + r) * row + k * column] * x;
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (o + r >= c.keys) break;
        const int at = (o + r) * kPassColumns + lane;
        float sum = p.transitions ? sums[r] : totals[o + r] * before[at];
        if (value < c.values) {
          float& to = p.passed[(unit * c.keys + o + r) * c.values + value];
          sum += to;
          to = sum;
        }
        after[at] = sum;
      }
    }
    float* const swapped = before;
    before = after;
    after = swapped;
    __syncthreads();
  }
}

}  // namespace memkernels::scan::cuda
