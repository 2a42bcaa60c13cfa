// What the kernels of the chunk engine share: where chunks are, and their tiles.
#pragma once

#include "core/cuda/tile.cuh"
#include "scan/chunk_scan_cuda.h"

namespace memkernels::scan::cuda {

// The number of a sequence's first chunk.
template <int kTokens>
__device__ __forceinline__ int64_t first_chunk(const ChunkParams& p, int64_t n) {
  return p.sequences.cu_seqlens.data ? span_of(p.sequences, n).begin / kTokens + n
                                     : n * p.chunks_of_row;
}

// How many segments of so many tokens a sequence has; its last one has fewer than twice as many.
__host__ __device__ __forceinline__ int64_t segments_of(int64_t tokens, int64_t length) {
  return length < tokens ? 1 : length / tokens;
}

// The number of its first segment.
__device__ __forceinline__ int64_t first_segment(const ChunkParams& p, int64_t tokens, int64_t n) {
  if (p.sequences.cu_seqlens.data) return span_of(p.sequences, n).begin / tokens + n;
  return n * segments_of(tokens, p.sequences.tokens);
}

struct ChunkOf {
  int64_t sequence, batch, begin;  // the first token
  int count;                       // of tokens
};

// Whether the number is a chunk's.
template <int kTokens>
__device__ __forceinline__ bool find_chunk(const ChunkParams& p, int64_t number, ChunkOf& c) {
  const auto first = [&](int64_t n) { return first_chunk<kTokens>(p, n); };
  c.sequence = last_at_most(p.sequences.count, number, first);
  const Span span = span_of(p.sequences, c.sequence);
  c.batch = span.batch;
  c.begin = span.begin + (number - first(c.sequence)) * kTokens;
  if (c.begin < span.begin || c.begin >= span.end) return false;
  c.count = static_cast<int>(clamp(span.end - c.begin, 0, kTokens));
  return true;
}

// A part of a sequence.
struct SegmentOf {
  int64_t sequence;
  Span span;           // the sequence's
  int64_t begin, end;  // tokens of it
  bool first, last;
};

// Whether the number is a segment's.
__device__ __forceinline__ bool find_segment(const ChunkParams& p, int64_t tokens, int64_t number,
                                             SegmentOf& s) {
  const auto first = [&](int64_t n) { return first_segment(p, tokens, n); };
  s.sequence = last_at_most(p.sequences.count, number, first);
  s.span = span_of(p.sequences, s.sequence);
  const int64_t length = s.span.end - s.span.begin, i = number - first(s.sequence);
  const int64_t count = segments_of(tokens, length);
  if (i < 0 || i >= count) return false;
  s.first = i == 0;
  s.last = i == count - 1;
  s.begin = i * tokens;
  s.end = s.last ? length : s.begin + tokens;
  return true;
}

template <class T>
__device__ __forceinline__ const T* row_at(const TokenRows& rows, int64_t batch, int64_t token,
                                           int64_t head) {
  return static_cast<const T*>(rows.data) + batch * rows.batch_stride + token * rows.token_stride +
         head * rows.head_stride;
}

template <class T>
__device__ __forceinline__ float gate_at(const Gate& gate, int64_t batch, int64_t token,
                                         int64_t head, int64_t channel = 0) {
  const int64_t offset = batch * gate.rows.batch_stride + token * gate.rows.token_stride +
                         head * gate.rows.head_stride + channel;
  return companion_at<T>(gate.rows.data, gate.is_float, offset);
}

// Starts copying `count` rows to a tile, zeros for the others of `rows`.
template <class T>
__device__ __forceinline__ void copy_rows(const Tile& tile, int rows, int count, const T* first,
                                          int64_t stride, int dim, bool aligned) {
  constexpr int kLanes = 8;
  for (int i = threadIdx.x / kLanes; i < rows; i += blockDim.x / kLanes) {
    copy_row<T, kLanes>(tile, i, first + (i < count ? i : 0) * stride, dim, threadIdx.x % kLanes,
                        aligned, i < count);
  }
}

__device__ __forceinline__ void clear_memory(char* data, int bytes) {
  for (int i = threadIdx.x; i < bytes / 4; i += blockDim.x) {
    reinterpret_cast<uint32_t*>(data)[i] = 0;
  }
}

}  // namespace memkernels::scan::cuda
