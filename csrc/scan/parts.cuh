// Sequences in parts of as many tokens, counted from each one's beginning. Parts are numbered
// through in the order of the sequences; where these are packed, some numbers stand for no part, so
// that the host knows how many there are.
#pragma once

#include "scan/sequences.cuh"

namespace memkernels::scan::cuda {

struct PartParams {
  SequenceParams sequences;
  int64_t length;  // of a part
  int64_t of_row;  // parts of a row of the batch
  int64_t count;
};

inline PartParams part_params(const Sequences& s, int64_t length) {
  const int64_t of_row = ceil_div(s.tokens, length);
  const int64_t count = given(s.cu_seqlens) ? s.tokens / length + s.count : s.count * of_row;
  return {sequence_params(s), length, of_row, s.count > 0 ? count : 0};
}

// The number of a sequence's first part.
__device__ __forceinline__ int64_t first_part(const PartParams& p, int64_t n, const Span& span) {
  return p.sequences.cu_seqlens.data ? span.begin / p.length + n : n * p.of_row;
}

struct Part {
  int64_t sequence, begin;  // begin: a token's position in the sequence; behind its end: no part
  Span span;                // of the whole sequence
};

__device__ __forceinline__ Part part_at(const PartParams& p, int64_t i) {
  const SequenceParams& s = p.sequences;
  if (!s.cu_seqlens.data) {
    const int64_t n = i / p.of_row;
    return {n, (i - n * p.of_row) * p.length, span_of(s, n)};
  }
  const int64_t n = last_at_most(s.count, (i + 1) * p.length - 1, [&](int64_t b) {
    return clamp(at(s.cu_seqlens, b), 0, s.tokens) + b * p.length;
  });
  const Span span = span_of(s, n);
  const int64_t index = i - first_part(p, n, span), none = (span.end - span.begin) / p.length + 1;
  return {n, (index < 0 ? none : index) * p.length, span};
}

}  // namespace memkernels::scan::cuda
