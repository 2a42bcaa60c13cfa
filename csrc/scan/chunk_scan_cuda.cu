// From the arguments of the chunk engine to its kernels and their grids.
#include "scan/chunk_scan_cuda.h"

#include <algorithm>

#include "scan/chunk_pass_kernel.cuh"
#include "scan/chunk_prepare_channels_kernel.cuh"
#include "scan/chunk_prepare_kernel.cuh"
#include "scan/chunk_walk_kernel.cuh"

namespace memkernels::scan::cuda {

ChunkParams prepare(const char* op, const ChunkScanArgs& a, const Sequences& sequences,
                    const Context& ctx) {
  check_supported(op, "q", a.q);
  const int64_t keys = a.q.shape[3], size = item_size(a.q.dtype);
  check(keys <= kMostKeys, op, "q has rows of K = ", keys, "; on CUDA there may be ", kMostKeys);
  ChunkParams p{};
  p.q = token_rows(a.q);
  p.k = token_rows(a.k);
  p.v = token_rows(a.v);
  if (given(a.beta)) p.beta = {token_rows(a.beta), a.beta.dtype == Dtype::f32};
  if (given(a.g)) p.g = {token_rows(a.g), a.g.dtype == Dtype::f32};
  p.channels = given(a.g) && a.g.ndim == 4;
  p.qk_l2norm = a.qk_l2norm;
  p.scale = static_cast<float>(a.scale);
  p.sequences = sequence_params(sequences);
  p.heads = as_int(op, "heads of v", a.v.shape[2]);
  p.group = static_cast<int>(a.v.shape[2] / a.q.shape[2]);
  p.keys = static_cast<int>(keys);
  p.values = as_int(op, "columns of v", a.v.shape[3]);
  p.row = static_cast<int>(ceil_div(keys * size, 16) * 16 / size);
  p.key_row = static_cast<int>(ceil_div(keys, 4) * 4);
  p.qk_aligned = aligned_to_16(a.q) && aligned_to_16(a.k);
  p.v_aligned = aligned_to_16(a.v);
  with_shape(a.q.dtype, keys, [&](auto type, auto dim) {
    using T = decltype(type);
    constexpr int kTokens = chunk_tokens(sizeof(T), dim);
    p.chunks_of_row = ceil_div(sequences.tokens, kTokens);
    p.num_chunks = given(a.cu_seqlens) ? sequences.tokens / kTokens + sequences.count
                                       : sequences.count * p.chunks_of_row;
    const int64_t units = p.num_chunks * p.heads;
    const auto allocate = [&](int64_t bytes) { return ctx.allocate(ctx, units * bytes); };
    p.prepared.scores = allocate(kTokens * kTokens * sizeof(T));
    p.prepared.factors = static_cast<float*>(allocate(4 * kTokens * sizeof(float)));
    p.prepared.totals = static_cast<float*>(allocate(p.key_row * sizeof(float)));
    if (given(a.beta)) {
      p.prepared.solve = static_cast<float*>(allocate(kTokens * kTokens * sizeof(float)));
    }
    // In float16 the norms of rows that are nearly zero would be too large as factors.
    if (p.channels || !p.qk_aligned || (p.qk_l2norm && a.q.dtype == Dtype::f16)) {
      p.prepared.rows = allocate(3 * kTokens * p.row * sizeof(T));
    }
    if (p.channels) {
      launch(op, ctx, prepare_channel_chunks<T, kTokens>, units, kChannelThreads,
             prepare_channels_bytes<T, kTokens>(p), p);
    } else {
      launch(op, ctx, prepare_chunks<T, kTokens>, units, PrepareShape<kTokens>::kThreads,
             prepare_bytes<T, kTokens>(p), p);
    }
  });
  return p;
}

namespace {

// Few heads of few columns of V leave a GPU idle: their long sequences are cut into segments, whose
// length follows from these numbers alone, so that no bit depends on the batch.
int64_t segment_tokens(const ChunkParams& c) {
  constexpr int64_t kWhole = int64_t{1} << 40, kMostWarps = 256, kLeast = 1024, kChunk = 64;
  const int64_t warps = c.heads * ceil_div(c.values, kWarpValues);
  if (warps > kMostWarps) return kWhole;
  return std::max(kLeast, ceil_div(32 * warps, kChunk) * kChunk);
}

void launch_walk(const char* op, WalkParams p, bool back, Dtype dtype, const Context& ctx) {
  const ChunkParams& c = p.c;
  const Limits limits = limits_of(op, ctx.device);
  const int64_t pairs = p.num_segments * c.heads;
  const auto blocks_of = [&](int warps) {
    return static_cast<int>(ceil_div(c.values, warps * kWarpValues));
  };
  int warps = kWalkWarps;
  while (warps > 1 && blocks_of(warps / 2) == 1) warps /= 2;
  while (warps > 1 && pairs * blocks_of(warps) * 2 <= limits.multiprocessors) warps /= 2;
  with_shape(dtype, c.keys, [&](auto type, auto dim) {
    using T = decltype(type);
    const auto stage_bytes = [&] { return ChunkTiles<T, dim>(nullptr, c, warps).bytes; };
    while (warps > 1 && stage_bytes() > limits.of_block) warps /= 2;
    p.value_blocks = blocks_of(warps);
    p.stages = 2 * stage_bytes() <= limits.of_block ? 2 : 1;
    launch(op, ctx, back ? walk_back<T, dim> : walk_chunks<T, dim>, pairs * p.value_blocks,
           32 * warps, p.stages * stage_bytes(), p);
  });
}

// What segments make of the states before them, [segment, head][K][K], where there are such: of
// last ones if also walked back.
const float* find_transitions(const char* op, const WalkParams& walked, bool back, Dtype dtype,
                              const Context& ctx) {
  WalkParams p{};
  p.c = walked.c;
  p.c.v = {};
  p.c.values = p.c.keys;
  p.segment = walked.segment;
  p.num_segments = walked.num_segments;
  p.identity = true;
  p.skip_first = !walked.initial_state.data;
  p.skip_last = !back;
  const int64_t size = int64_t{p.c.keys} * p.c.keys * sizeof(float);
  p.partial = static_cast<float*>(ctx.allocate(ctx, p.num_segments * p.c.heads * size));
  launch_walk(op, p, false, dtype, ctx);
  return p.partial;
}

}  // namespace

void walk(const char* op, WalkParams p, bool back, Dtype dtype, const float** transitions,
          const Context& ctx) {
  const ChunkParams& c = p.c;
  const SequenceParams& s = c.sequences;
  p.segment = segment_tokens(c);
  p.num_segments = s.cu_seqlens.data ? s.tokens / p.segment + s.count
                                     : s.count * segments_of(p.segment, s.tokens);
  if (p.num_segments > s.count) {
    const float* found = transitions ? *transitions : nullptr;
    if (c.prepared.solve && !found) {
      found = find_transitions(op, p, transitions != nullptr, dtype, ctx);
    }
    if (transitions) *transitions = found;
    WalkParams parts = p;
    (back ? parts.skip_first : parts.skip_last) = true;
    parts.out = parts.us = parts.states = nullptr;
    const int64_t size = int64_t{c.keys} * c.values * sizeof(float);
    parts.partial = static_cast<float*>(ctx.allocate(ctx, p.num_segments * c.heads * size));
    launch_walk(op, parts, back, dtype, ctx);
    const PassParams pass{c, p.segment, back, p.initial_state, found, parts.partial};
    with_shape(dtype, c.keys, [&](auto type, auto dim) {
      constexpr int kTokens = chunk_tokens(sizeof(type), dim);
      launch(op, ctx, pass_states<kTokens>, s.count * c.heads * ceil_div(c.values, kPassColumns),
             kPassThreads, (2 * kPassColumns + 1) * c.keys * sizeof(float), pass);
    });
    p.passed = parts.partial;
  }
  launch_walk(op, p, back, dtype, ctx);
}

void chunk_scan(const char* op, const ChunkScanArgs& a, const Sequences& sequences,
                const Context& ctx) {
  const DeviceGuard guard(op, ctx.device);
  WalkParams p{};
  p.c = prepare(op, a, sequences, ctx);
  NormalizerParams normalizer{p.c};
  if (a.normalize) normalizers(op, normalizer, a, ctx);
  p.inverse = normalizer.inverse;
  p.initial_state = state_rows(a.initial_state);
  p.state = static_cast<float*>(a.state.data);
  p.out = a.out.data;
  walk(op, p, false, a.q.dtype, nullptr, ctx);
}

}  // namespace memkernels::scan::cuda
