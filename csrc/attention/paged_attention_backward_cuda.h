// What the CUDA kernels of paged attention's backward read.
#pragma once

#include "attention/paged_attention_cuda.h"

namespace memkernels::attention::cuda {

// Of a query and head: its lse in base 2 (inf where it sees no key, so that all weights vanish),
// and delta = dout . out - dlse.
struct RowGradient {
  float lse, delta;
};

struct BackwardParams {
  AttentionParams a;  // of the forward, with splits = 1
  const void* out;    // [total_q, Hq, Dv], contiguous
  const float* lse;   // [total_q, Hq]
  const void* dout;   // [total_q, Hq, Dv]
  int64_t dout_stride, dout_head_stride;
  bool dout_aligned;
  const float* dlse;  // [total_q, Hq] or null
  RowGradient* rows;  // [total_q, Hq], computed first
  void* dq;           // contiguous, as all gradients; each null if not wanted
  void *dk, *dv;      // k_cache's and v_cache's shape, zeroed
  void* dkey_bias;    // of key_bias's dtype, zeroed
  void* dsink_logit;  // [Hq], of sink_logit's dtype

  // The gradients of keys are computed by units: a page, a listed token, or, where there are
  // neither pages nor lists, part of a sequence. `runs`: units have the entries of page tables or
  // lists that name them, in order; else each belongs to one sequence.
  bool runs;
  int64_t num_units;  // pages, or tokens of the cache
  int unit;           // tokens of one
  int parts_of_unit;  // blocks of keys
  int lists;          // of a query: 1 or Hkv
  int num_entries;
  const int* entries;    // sorted by list and unit
  const int* run_begin;  // [lists * num_units + 1]: where the entries of each begin
};

// Head dimensions of dk and dv are cut into slices, so that sums fit into registers.
inline constexpr int kSlice = 128;

// Rows of a block that computes dq.
constexpr int rows_of_dq(int item_size, int dim) { return item_size * dim <= 512 ? 64 : 16; }
// Rows that a block of `keys` keys takes at a time.
constexpr int rows_of_dkv(int item_size, int dim, int keys) {
  const int row = item_size * dim;
  return keys == 64 ? 32 : row <= 256 ? 64 : row <= 512 ? 32 : 16;
}
constexpr bool has_64_keys(int item_size, int dim) { return item_size * dim <= 512; }

// Units, and the entries of the page table or the lists that name them.
void find_units(const char* op, BackwardParams& p, const Context& ctx);

// Compiled one pair of T and kDim a file (paged_attention_backward_instance.cu).
template <class T, int kDim>
void launch_dq(const char* op, const BackwardParams& p, int64_t blocks, int64_t shared_bytes,
               const Context& ctx);
template <class T, int kDim>
void launch_dkv(const char* op, const BackwardParams& p, int keys, int64_t blocks,
                int64_t shared_bytes, const Context& ctx);

}  // namespace memkernels::attention::cuda
