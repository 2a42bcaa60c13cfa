// Torch ops of the attention family: schemas and adapters.
#include "attention/paged_attention.h"

#include <string>

#include "attention/append_kv.h"
#include "attention/compact_kv.h"
#include "attention/copy_pages.h"
#include "attention/merge_states.h"
#include "bindings/torch/attention_args.h"
#include "bindings/torch/convert.h"
#include "core/check.h"

namespace memkernels::binding {

using attention::PagedAttentionArgs;

PagedAttentionArgs paged_attention_args(
    const char* op, const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
    const OptionalTensor& page_table, const OptionalTensor& seq_lens,
    const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
    const OptionalTensor& head_window, const OptionalTensor& key_bias,
    const OptionalTensor& sink_logit, double scale, bool causal, std::optional<int64_t> window,
    int64_t sink_tokens, double softcap, std::optional<int64_t> max_seqlen) {
  PagedAttentionArgs a;
  a.q = view(op, "q", q);
  a.k_cache = view(op, "k_cache", k_cache);
  a.v_cache = view(op, "v_cache", v_cache);
  a.page_table = view(op, "page_table", page_table);
  a.seq_lens = view(op, "seq_lens", seq_lens);
  a.cu_seqlens_q = view(op, "cu_seqlens_q", cu_seqlens_q);
  a.cu_seqlens_k = view(op, "cu_seqlens_k", cu_seqlens_k);
  a.head_window = view(op, "window", head_window);
  a.key_bias = view(op, "key_bias", key_bias);
  a.sink_logit = view(op, "sink_logit", sink_logit);
  check(!(window && head_window), op, "window must be a number or a tensor, not both");
  check(!window || *window >= 1, op, "window must be at least 1, got ", window.value_or(0));
  check(!max_seqlen || *max_seqlen >= 0, op, "max_seqlen must not be negative, got ",
        max_seqlen.value_or(0));
  a.scale = scale;
  a.causal = causal;
  a.window = window.value_or(-1);
  a.sink_tokens = sink_tokens;
  a.softcap = softcap;
  a.max_seqlen = max_seqlen.value_or(-1);
  return a;
}

namespace {

PagedAttentionArgs gather_attention_args(const char* op, const Tensor& q, const Tensor& k_cache,
                                         const Tensor& v_cache, const Tensor& indices,
                                         const OptionalTensor& page_table,
                                         const OptionalTensor& seq_lens,
                                         const OptionalTensor& cu_seqlens_q,
                                         const OptionalTensor& key_bias,
                                         const OptionalTensor& sink_logit, const std::string& unit,
                                         double scale, bool causal, double softcap) {
  PagedAttentionArgs a = paged_attention_args(
      op, q, k_cache, v_cache, page_table, seq_lens, cu_seqlens_q, std::nullopt, std::nullopt,
      key_bias, sink_logit, scale, causal, std::nullopt, 0, softcap, std::nullopt);
  check(unit == "page" || unit == "token", op, "unit must be page or token, got ", unit);
  a.indices = view(op, "indices", indices);
  a.index_pages = unit == "page";
  return a;
}

std::tuple<Tensor, Tensor> run_forward(const char* op, PagedAttentionArgs& a) {
  check(a.q.ndim == 3, op, "q must be [total_q, Hq, D], got ", shape_of(a.q));
  check(a.v_cache.ndim >= 1, op, "v_cache must have a head dimension");
  check_floating(op, "q", a.q);
  const int64_t dim_v = a.v_cache.shape[a.v_cache.ndim - 1];
  Tensor out = empty({a.q.shape[0], a.q.shape[1], dim_v}, a.q.dtype, a.q.device);
  Tensor lse = empty({a.q.shape[0], a.q.shape[1]}, accumulator(a.q.dtype), a.q.device);
  a.out = view(op, "out", out);
  a.lse = view(op, "lse", lse);
  attention::paged_attention(a, OpContext(op, a.q.device));
  return {out, lse};
}

std::tuple<Tensor, Tensor> paged_attention(
    const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const OptionalTensor& page_table,
    const OptionalTensor& seq_lens, const OptionalTensor& cu_seqlens_q,
    const OptionalTensor& cu_seqlens_k, const OptionalTensor& head_window,
    const OptionalTensor& key_bias, const OptionalTensor& sink_logit, double scale, bool causal,
    std::optional<int64_t> window, int64_t sink_tokens, double softcap,
    std::optional<int64_t> max_seqlen) {
  constexpr char op[] = "paged_attention";
  PagedAttentionArgs a = paged_attention_args(
      op, q, k_cache, v_cache, page_table, seq_lens, cu_seqlens_q, cu_seqlens_k, head_window,
      key_bias, sink_logit, scale, causal, window, sink_tokens, softcap, max_seqlen);
  return run_forward(op, a);
}

std::tuple<Tensor, Tensor> gather_attention(
    const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& indices,
    const OptionalTensor& page_table, const OptionalTensor& seq_lens,
    const OptionalTensor& cu_seqlens_q, const OptionalTensor& key_bias,
    const OptionalTensor& sink_logit, std::string unit, double scale, bool causal, double softcap) {
  constexpr char op[] = "gather_attention";
  PagedAttentionArgs a =
      gather_attention_args(op, q, k_cache, v_cache, indices, page_table, seq_lens, cu_seqlens_q,
                            key_bias, sink_logit, unit, scale, causal, softcap);
  return run_forward(op, a);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Bits of `needs`: q, k_cache, v_cache, key_bias, sink_logit. What is not needed comes back empty.
Gradients run_backward(const char* op, PagedAttentionArgs& a, const Tensor& dout,
                       const OptionalTensor& dlse, const Tensor& out, const Tensor& lse,
                       int64_t needs) {
  a.out = view(op, "out", out);
  a.lse = view(op, "lse", lse);
  attention::PagedAttentionGrads g;
  g.dout = view(op, "dout", dout);
  g.dlse = view(op, "dlse", dlse);
  const auto gradient = [&](int bit, const TensorView& like, bool zero, TensorView& to) {
    const bool needed = (needs >> bit & 1) && given(like);
    Tensor t = needed ? empty_like(like, zero) : empty({0}, a.q.dtype, a.q.device);
    if (needed) to = view(op, "gradient", t);
    return t;
  };
  Tensor dq = gradient(0, a.q, false, g.dq);
  Tensor dk = gradient(1, a.k_cache, true, g.dk_cache);
  Tensor dv = gradient(2, a.v_cache, true, g.dv_cache);
  Tensor dkey_bias = gradient(3, a.key_bias, true, g.dkey_bias);
  Tensor dsink_logit = gradient(4, a.sink_logit, true, g.dsink_logit);
  attention::paged_attention_backward(a, g, OpContext(op, a.q.device));
  return {dq, dk, dv, dkey_bias, dsink_logit};
}

Gradients paged_attention_backward(
    const Tensor& dout, const OptionalTensor& dlse, const Tensor& out, const Tensor& lse,
    const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const OptionalTensor& page_table,
    const OptionalTensor& seq_lens, const OptionalTensor& cu_seqlens_q,
    const OptionalTensor& cu_seqlens_k, const OptionalTensor& head_window,
    const OptionalTensor& key_bias, const OptionalTensor& sink_logit, int64_t needs, double scale,
    bool causal, std::optional<int64_t> window, int64_t sink_tokens, double softcap,
    std::optional<int64_t> max_seqlen) {
  constexpr char op[] = "paged_attention_backward";
  PagedAttentionArgs a = paged_attention_args(
      op, q, k_cache, v_cache, page_table, seq_lens, cu_seqlens_q, cu_seqlens_k, head_window,
      key_bias, sink_logit, scale, causal, window, sink_tokens, softcap, max_seqlen);
  return run_backward(op, a, dout, dlse, out, lse, needs);
}

Gradients gather_attention_backward(const Tensor& dout, const OptionalTensor& dlse,
                                    const Tensor& out, const Tensor& lse, const Tensor& q,
                                    const Tensor& k_cache, const Tensor& v_cache,
                                    const Tensor& indices, const OptionalTensor& page_table,
                                    const OptionalTensor& seq_lens,
                                    const OptionalTensor& cu_seqlens_q,
                                    const OptionalTensor& key_bias,
                                    const OptionalTensor& sink_logit, int64_t needs,
                                    std::string unit, double scale, bool causal, double softcap) {
  constexpr char op[] = "gather_attention_backward";
  PagedAttentionArgs a =
      gather_attention_args(op, q, k_cache, v_cache, indices, page_table, seq_lens, cu_seqlens_q,
                            key_bias, sink_logit, unit, scale, causal, softcap);
  return run_backward(op, a, dout, dlse, out, lse, needs);
}

attention::MergeStatesArgs merge_states_args(const char* op, const Tensor& outs,
                                             const Tensor& lses) {
  attention::MergeStatesArgs a;
  a.outs = view(op, "outs", outs);
  a.lses = view(op, "lses", lses);
  check(a.outs.ndim == 4, op, "outs must be [n, T, H, D], got ", shape_of(a.outs));
  check(a.lses.ndim == 3, op, "lses must be [n, T, H], got ", shape_of(a.lses));
  return a;
}

std::tuple<Tensor, Tensor> merge_states(const Tensor& outs, const Tensor& lses) {
  constexpr char op[] = "merge_states";
  attention::MergeStatesArgs a = merge_states_args(op, outs, lses);
  const int64_t* shape = a.outs.shape;
  Tensor out = empty({shape[1], shape[2], shape[3]}, a.outs.dtype, a.outs.device);
  Tensor lse = empty({shape[1], shape[2]}, a.lses.dtype, a.outs.device);
  a.out = view(op, "out", out);
  a.lse = view(op, "lse", lse);
  attention::merge_states(a, OpContext(op, a.outs.device));
  return {out, lse};
}

std::tuple<Tensor, Tensor> merge_states_backward(const Tensor& dout, const OptionalTensor& dlse,
                                                 const Tensor& out, const Tensor& lse,
                                                 const Tensor& outs, const Tensor& lses) {
  constexpr char op[] = "merge_states_backward";
  attention::MergeStatesArgs a = merge_states_args(op, outs, lses);
  a.out = view(op, "out", out);
  a.lse = view(op, "lse", lse);
  attention::MergeStatesGrads g;
  g.dout = view(op, "dout", dout);
  g.dlse = view(op, "dlse", dlse);
  Tensor douts = empty_like(a.outs);
  Tensor dlses = empty_like(a.lses);
  g.douts = view(op, "douts", douts);
  g.dlses = view(op, "dlses", dlses);
  attention::merge_states_backward(a, g, OpContext(op, a.outs.device));
  return {douts, dlses};
}

void append_kv(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
               const Tensor& slot_mapping) {
  constexpr char op[] = "append_kv";
  attention::AppendKvArgs a;
  a.k = view(op, "k", k);
  a.v = view(op, "v", v);
  a.k_cache = view(op, "k_cache", k_cache);
  a.v_cache = view(op, "v_cache", v_cache);
  a.slot_mapping = view(op, "slot_mapping", slot_mapping);
  attention::append_kv(a, OpContext(op, a.k_cache.device));
}

void copy_pages(const Tensor& k_cache, const Tensor& v_cache, const Tensor& pairs) {
  constexpr char op[] = "copy_pages";
  attention::CopyPagesArgs a;
  a.k_cache = view(op, "k_cache", k_cache);
  a.v_cache = view(op, "v_cache", v_cache);
  a.pairs = view(op, "pairs", pairs);
  attention::copy_pages(a, OpContext(op, a.k_cache.device));
}

Tensor compact_kv(const Tensor& k_cache, const Tensor& v_cache, const Tensor& page_table,
                  const Tensor& seq_lens, const Tensor& keep) {
  constexpr char op[] = "compact_kv";
  attention::CompactKvArgs a;
  a.k_cache = view(op, "k_cache", k_cache);
  a.v_cache = view(op, "v_cache", v_cache);
  a.page_table = view(op, "page_table", page_table);
  a.seq_lens = view(op, "seq_lens", seq_lens);
  a.keep = view(op, "keep", keep);
  Tensor new_seq_lens = empty_like(a.seq_lens);
  a.new_seq_lens = view(op, "new_seq_lens", new_seq_lens);
  attention::compact_kv(a, OpContext(op, a.k_cache.device));
  return new_seq_lens;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(MEMKERNELS_NAMESPACE, m) {
  m.def(
      "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? page_table, "
      "Tensor? seq_lens, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? head_window, "
      "Tensor? key_bias, Tensor? sink_logit, *, float scale, bool causal=True, int? window=None, "
      "int sink_tokens=0, float softcap=0.0, int? max_seqlen=None) -> (Tensor out, Tensor lse)");
  m.def(
      "paged_attention_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, Tensor q, "
      "Tensor k_cache, Tensor v_cache, Tensor? page_table, Tensor? seq_lens, "
      "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? head_window, Tensor? key_bias, "
      "Tensor? sink_logit, *, int needs, float scale, bool causal=True, int? window=None, "
      "int sink_tokens=0, float softcap=0.0, int? max_seqlen=None) "
      "-> (Tensor dq, Tensor dk_cache, Tensor dv_cache, Tensor dkey_bias, Tensor dsink_logit)");
  m.def(
      "gather_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor indices, "
      "Tensor? page_table, Tensor? seq_lens, Tensor? cu_seqlens_q, Tensor? key_bias, "
      "Tensor? sink_logit, *, str unit, float scale, bool causal=True, float softcap=0.0) "
      "-> (Tensor out, Tensor lse)");
  m.def(
      "gather_attention_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, Tensor q, "
      "Tensor k_cache, Tensor v_cache, Tensor indices, Tensor? page_table, Tensor? seq_lens, "
      "Tensor? cu_seqlens_q, Tensor? key_bias, Tensor? sink_logit, *, int needs, str unit, "
      "float scale, bool causal=True, float softcap=0.0) "
      "-> (Tensor dq, Tensor dk_cache, Tensor dv_cache, Tensor dkey_bias, Tensor dsink_logit)");
  m.def("merge_states(Tensor outs, Tensor lses) -> (Tensor out, Tensor lse)");
  m.def(
      "merge_states_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, Tensor outs, "
      "Tensor lses) -> (Tensor douts, Tensor dlses)");
  m.def(
      "append_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping) "
      "-> ()");
  m.def("copy_pages(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor pairs) -> ()");
  m.def(
      "compact_kv(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor page_table, Tensor seq_lens, "
      "Tensor keep) -> Tensor");
}

template <class Library>
static void implement(Library& m) {
  m.impl("paged_attention", TORCH_BOX(&paged_attention));
  m.impl("paged_attention_backward", TORCH_BOX(&paged_attention_backward));
  m.impl("gather_attention", TORCH_BOX(&gather_attention));
  m.impl("gather_attention_backward", TORCH_BOX(&gather_attention_backward));
  m.impl("merge_states", TORCH_BOX(&merge_states));
  m.impl("merge_states_backward", TORCH_BOX(&merge_states_backward));
  m.impl("append_kv", TORCH_BOX(&append_kv));
  m.impl("copy_pages", TORCH_BOX(&copy_pages));
  m.impl("compact_kv", TORCH_BOX(&compact_kv));
}

STABLE_TORCH_LIBRARY_IMPL(MEMKERNELS_NAMESPACE, CPU, m) { implement(m); }

#if defined(MEMKERNELS_WITH_CUDA) && !defined(MEMKERNELS_SIMT)
STABLE_TORCH_LIBRARY_IMPL(MEMKERNELS_NAMESPACE, CUDA, m) { implement(m); }
#endif

}  // namespace memkernels::binding
