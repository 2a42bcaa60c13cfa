// The arguments of attention over a KV cache, from torch's.
#pragma once

#include "attention/paged_attention.h"
#include "bindings/torch/convert.h"

namespace memkernels::binding {

attention::PagedAttentionArgs paged_attention_args(
    const char* op, const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
    const OptionalTensor& page_table, const OptionalTensor& seq_lens,
    const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
    const OptionalTensor& head_window, const OptionalTensor& key_bias,
    const OptionalTensor& sink_logit, double scale, bool causal, std::optional<int64_t> window,
    int64_t sink_tokens, double softcap, std::optional<int64_t> max_seqlen);

}  // namespace memkernels::binding
