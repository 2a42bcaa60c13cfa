// What the CUDA kernels of the chunk engine read and leave to one another.
#pragma once

#include <type_traits>

#include "core/cuda/launch.h"
#include "scan/chunk_scan.h"
#include "scan/sequences.cuh"

namespace memkernels::scan::cuda {

inline constexpr int kBlock = 16;  // tokens: a tile of a matrix product
inline constexpr int kMostKeys = 256;

// Tokens of a chunk, for rows of up to `dim` elements of that size: 16 KiB of rows.
constexpr int chunk_tokens(int element, int dim) { return 16384 / (element * dim); }

// Rows [B, T, heads, dim] in memory.
struct TokenRows {
  const void* data;
  int64_t batch_stride, token_stride, head_stride;
};

// A gate [B, T, HV] or [B, T, HV, K]; absent: no data.
struct Gate {
  TokenRows rows;
  bool is_float;
};

// Chunks are numbered so that those of a sequence follow one another; a few numbers are nobody's.
// Of chunk c and value head h, element c * heads + h:
struct Prepared {
  void* scores;    // T [tokens][tokens] of a chunk, zeros above the diagonal
  float* solve;    // [tokens][tokens]: -beta keys below the diagonal; within blocks, what I minus
                   // that is the inverse of; or absent: linear attention
  float* factors;  // [4][tokens] of what q reads, k erases and writes; beta
  float* totals;   // [key_row] what the state decays by
  void* rows;  // T [3][tokens][row]: q as it reads, k as it erases, with decays of channels, and
               // as it writes; or absent: q and k themselves
};

struct ChunkParams {
  TokenRows q, k, v;
  Gate beta, g;
  bool channels;  // a decay of each channel
  bool qk_l2norm;
  float scale;
  SequenceParams sequences;
  int64_t num_chunks;          // numbers of chunks
  int64_t chunks_of_row;       // of a row of the batch; without cu_seqlens
  int heads, group;            // value heads, and how many share a head of q
  int keys, values;            // K, V
  int row, key_row;            // K, rounded up to 16 bytes of T and of float
  bool qk_aligned, v_aligned;  // to 16 bytes
  Prepared prepared;
};

// A walk over chunks, to the end; or back, where v is dout, S its gradient, and U dR: the gradient
// of U before it was solved.
struct WalkParams {
  ChunkParams c;
  int value_blocks, stages;
  TokenRows initial_state;  // S [N, HV, K, V] by strides of N, K, HV; or absent
  const float* inverse;     // [chunk, head][tokens] of the normaliser, or absent
  // A long sequence is walked in segments at once, numbered as chunks are:
  int64_t segment, num_segments;  // tokens of one; numbers of all
  const float* passed;            // [segment, head][K][V] S after the segment
  float* partial;                 // the same if S before it were 0, to be written, alone; or absent
  bool identity;                  // if it were I, and v 0
  bool skip_first, skip_last;     // segments of a sequence
  // Written, or absent.
  float* state;  // S [N, HV, K, V]
  void* out;     // T [B, T, HV, V] O, or dV
  void* us;      // T [B, T, HV, V] U
  void* states;  // T [chunk, head][V][row] S as the walk comes to the chunk
};

// From S after segments if S before them were 0, and what turns S before them into S after them, to
// S after them; or the same of gradients, back.
struct PassParams {
  ChunkParams c;
  int64_t segment;
  bool back;
  TokenRows initial_state;
  const float* transitions;  // [segment, head][K][K] of the walk to the end; or absent: `totals`
  float* passed;             // [segment, head][K][V], changed
};

struct NormalizerParams {
  ChunkParams c;
  float eps;
  // Written:
  float* zs;       // [chunk, head][key_row] z before each chunk
  float* inverse;  // [chunk, head][tokens]
};

struct NormalizerGradParams {
  ChunkParams c;
  const void *dout, *out;  // T [B, T, HV, V]
  const float* inverse;    // [chunk, head][tokens]
  // Written:
  float* dnormalizers;  // [chunk, head][tokens]
  float* dzs;           // [chunk, head][key_row] of z after each chunk
};

// z over chunks, or back.
struct ZWalkParams {
  ChunkParams c;
  bool back;
  TokenRows initial_z;  // [N, HV, K] by strides of N, K, HV; or absent
  float* zs;  // [chunk, head][key_row] what chunks add, changed to z as the walk comes there
  float* z;   // [N, HV, K], written; or absent
};

// What the gradients of a chunk's tokens are made of, all chunks at once.
struct ChunkGradParams {
  ChunkParams c;
  int stages;
  int channel_bytes;     // of shared memory for decays of channels; or none
  bool aligned;          // rows of dout, us and dus, to 16 bytes
  const void* dout;      // T [B, T, HV, V]
  const void *us, *dus;  // T [B, T, HV, V] U and, read for the delta rule only, dR
  const void* states;    // T [chunk, head][V][row] S before the chunk, and
  const void* dstates;   // the gradient of S after it
  // With a normaliser:
  const float* inverse;       // [chunk, head][tokens]
  const float* dnormalizers;  // [chunk, head][tokens] its gradient, and
  const float *zs, *dzs;  // [chunk, head][key_row] z before the chunk, the gradient of z after it
  // Written, contiguous; or absent.
  void *dq, *dk;  // [B, T, HV, K] of T, or float if dqk_is_float
  float* dbeta;   // [B, T, HV]
  float* dg;      // [B, T, HV] or [B, T, HV, K]
  bool dqk_is_float;
};

// Calls run(T, integral constant of what K is rounded up to).
template <class Run>
void with_shape(Dtype dtype, int64_t keys, const Run& run) {
  with_type(dtype, [&](auto type) {
    if (keys <= 128) {
      run(type, std::integral_constant<int, 128>());
    } else {
      run(type, std::integral_constant<int, kMostKeys>());
    }
  });
}

// [B, T, heads, dim].
inline TokenRows token_rows(const TensorView& t) {
  return {t.data, t.stride[0], t.stride[1], t.stride[2]};
}

// [N, HV, K, V], or [N, HV, K]; K is in the place of tokens.
inline TokenRows state_rows(const TensorView& t) {
  if (!given(t)) return {};
  return {t.data, t.stride[0], t.stride[2], t.stride[1]};
}

inline bool aligned_to_16(const TensorView& t) {
  return is_aligned(t, 3, 16) && t.shape[3] * item_size(t.dtype) % 16 == 0;
}

// Computes p.prepared.
ChunkParams prepare(const char* op, const ChunkScanArgs& a, const Sequences& sequences,
                    const Context& ctx);
// Sets p.zs and p.inverse, and the final z, if args have one.
void normalizers(const char* op, NormalizerParams& p, const ChunkScanArgs& a, const Context& ctx);
// transitions: what segments make of states, to be found, or as an earlier walk has found it; or
// null, if no other walk needs it.
void walk(const char* op, WalkParams p, bool back, Dtype dtype, const float** transitions,
          const Context& ctx);
// Sets p.dnormalizers and p.dzs; grads: dz and dinitial_z.
void normalizer_gradients(const char* op, NormalizerGradParams& p, const ChunkScanGrads& grads,
                          Dtype dtype, const Context& ctx);
// Sets p.stages and p.aligned.
void chunk_gradients(const char* op, ChunkGradParams& p, Dtype dtype, const Context& ctx);
void channel_gradients(const char* op, ChunkGradParams& p, Dtype dtype, const Context& ctx);

}  // namespace memkernels::scan::cuda
