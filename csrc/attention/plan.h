// From the arguments of paged attention to the Problem its kernels read.
#pragma once

#include <vector>

#include "attention/paged_attention.h"
#include "attention/problem.h"

namespace memkernels::attention {

// A Problem and the memory it points to.
struct Plan {
  Problem problem{};
  std::vector<Sequence> sequences;
  std::vector<int64_t> window;
  std::vector<double> sink_logit;
  int64_t total_q = 0;
};

// What metadata alone says.
struct Shapes {
  bool paged, packed;
  int kv_dims;  // dimensions of k_cache
  int64_t batch, total_q, heads, kv_heads, dim, dim_v;
};

// Refuses what the contract refuses in shapes, dtypes, strides, devices and options.
Shapes check_shapes(const char* op, const PagedAttentionArgs& args);

// Reads lengths, indices and the page table too, on the CPU, and refuses what contradicts.
// `plan` must stay where it is.
void make_plan(const char* op, const PagedAttentionArgs& args, Plan& plan);

namespace cuda {
void paged_attention(const char* op, const PagedAttentionArgs& args, const Shapes& shapes,
                     const Context& ctx);
void paged_attention_backward(const char* op, const PagedAttentionArgs& args,
                              const PagedAttentionGrads& grads, const Shapes& shapes,
                              const Context& ctx);
}  // namespace cuda

#ifdef MEMKERNELS_WITH_CUDA
// check_shapes, and with ctx.check_indices what make_plan refuses, for tensors on CUDA.
Shapes check_on_cuda(const char* op, const PagedAttentionArgs& args, const Context& ctx);
#endif

// Refuses cu_seqlens_q, or its absence, by what metadata says.
void check_query_offsets(const char* op, const TensorView& q, const TensorView& cu_seqlens_q,
                         int64_t batch);

// [B + 1]: where the queries of each sequence begin, one each without cu_seqlens_q; checked.
std::vector<int64_t> query_offsets(const char* op, const TensorView& q,
                                   const TensorView& cu_seqlens_q, int64_t batch);

// The sequence a row of q belongs to.
int64_t sequence_of(const Plan& plan, int64_t token);

// Workers worth waking for that many multiply-adds.
int workers_for(const Context& ctx, double multiply_adds);

// `leading` dimensions before the head dimension, if there is one: [outer, token, head] or
// [token, head].
Rows rows_of(const TensorView& t, int leading);

}  // namespace memkernels::attention
