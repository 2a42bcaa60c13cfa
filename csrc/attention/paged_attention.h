// Attention of queries over a paged, contiguous or packed KV cache, forward and backward: over all
// visible keys of the sequence (paged_attention), or over listed pages or tokens
// (gather_attention).
#pragma once

#include "core/context.h"
#include "core/tensor.h"

namespace memkernels::attention {

struct PagedAttentionArgs {
  TensorView q;             // [total_q, Hq, D]
  TensorView k_cache;       // [num_pages, page_size, Hkv, D]
                            //   or [B, Lmax, Hkv, D] (no page_table), [total_k, Hkv, D] (packed)
  TensorView v_cache;       // the same with Dv
  TensorView page_table;    // [B, max_pages] or absent
  TensorView seq_lens;      // [B]; absent: Lmax, or from cu_seqlens_k
  TensorView cu_seqlens_q;  // [B + 1]; absent: one query a sequence
  TensorView cu_seqlens_k;  // [B + 1]: packed K and V
  TensorView head_window;   // [Hkv] or absent
  TensorView indices;       // [total_q, Hkv or 1, K]: what gather_attention reads, else absent
  TensorView key_bias;      // k_cache's shape without D, or absent
  TensorView sink_logit;    // [Hq] or absent
  bool index_pages = true;  // indices name pages, else tokens
  double scale = 1.0;
  bool causal = true;
  int64_t window = -1;  // -1: none
  int64_t sink_tokens = 0;
  double softcap = 0.0;     // 0: none
  int64_t max_seqlen = -1;  // -1: not given
  TensorView out;           // [total_q, Hq, Dv]
  TensorView lse;           // [total_q, Hq]
};

void paged_attention(const PagedAttentionArgs& args, const Context& ctx);

// Gradients that are absent are not computed. dk_cache, dv_cache and dkey_bias are contiguous and
// come in zeroed; dq and dsink_logit are written whole.
struct PagedAttentionGrads {
  TensorView dout;         // [total_q, Hq, Dv]
  TensorView dlse;         // [total_q, Hq] or absent
  TensorView dq;           // [total_q, Hq, D]
  TensorView dk_cache;     // k_cache's shape
  TensorView dv_cache;     // v_cache's shape
  TensorView dkey_bias;    // key_bias's shape
  TensorView dsink_logit;  // [Hq]
};

void paged_attention_backward(const PagedAttentionArgs& args, const PagedAttentionGrads& grads,
                              const Context& ctx);

}  // namespace memkernels::attention
