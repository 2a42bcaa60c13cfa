// Torch ops of the selection family: schemas and adapters.
#include <string>

#include "bindings/torch/attention_args.h"
#include "bindings/torch/convert.h"
#include "core/check.h"
#include "selection/attention_colstats.h"
#include "selection/indexer_scores.h"
#include "selection/knn_topk.h"
#include "selection/score_pages.h"
#include "selection/select.h"
#include "selection/summarize_keys.h"

namespace memkernels::binding {

namespace {

using selection::SummaryKind;

SummaryKind summary_kind(const char* op, const std::string& kind) {
  check(kind == "minmax" || kind == "mean", op, "kind must be minmax or mean, got ", kind);
  return kind == "minmax" ? SummaryKind::minmax : SummaryKind::mean;
}

selection::SummarizeKeysArgs summarize_args(const char* op, const Tensor& k_cache,
                                            const Tensor& page_table, const Tensor& seq_lens) {
  selection::SummarizeKeysArgs a;
  a.k_cache = view(op, "k_cache", k_cache);
  a.page_table = view(op, "page_table", page_table);
  a.seq_lens = view(op, "seq_lens", seq_lens);
  return a;
}

Tensor summarize_keys(const Tensor& k_cache, const Tensor& page_table, const Tensor& seq_lens,
                      std::string kind) {
  constexpr char op[] = "summarize_keys";
  selection::SummarizeKeysArgs a = summarize_args(op, k_cache, page_table, seq_lens);
  a.kind = summary_kind(op, kind);
  const TensorView& k = a.k_cache;
  check(k.ndim == 4, op, "k_cache must be [num_pages, page_size, Hkv, D], got ", shape_of(k));
  Tensor summary =
      a.kind == SummaryKind::minmax
          ? empty({k.shape[0], k.shape[2], 2, k.shape[3]}, k.dtype, k.device)
          : empty({k.shape[0], k.shape[2], k.shape[3]}, accumulator(k.dtype), k.device);
  a.summary = view(op, "summary", summary);
  selection::summarize_keys(a, OpContext(op, k.device));
  return summary;
}

void update_summaries(const Tensor& summary, const Tensor& k_cache, const Tensor& page_table,
                      const Tensor& seq_lens, const OptionalTensor& num_new_each, int64_t num_new) {
  constexpr char op[] = "update_summaries";
  selection::SummarizeKeysArgs a = summarize_args(op, k_cache, page_table, seq_lens);
  a.summary = view(op, "summary", summary);
  a.kind = a.summary.ndim == 4 ? SummaryKind::minmax : SummaryKind::mean;
  selection::update_summaries(a, {view(op, "num_new", num_new_each), num_new},
                              OpContext(op, a.k_cache.device));
}

Tensor score_pages(const Tensor& q, const Tensor& summary, const Tensor& page_table,
                   const Tensor& seq_lens, const OptionalTensor& cu_seqlens_q, int64_t page_size,
                   std::string kind, std::string group_reduce, bool causal, double scale) {
  constexpr char op[] = "score_pages";
  selection::ScorePagesArgs a;
  a.q = view(op, "q", q);
  a.summary = view(op, "summary", summary);
  a.page_table = view(op, "page_table", page_table);
  a.seq_lens = view(op, "seq_lens", seq_lens);
  a.cu_seqlens_q = view(op, "cu_seqlens_q", cu_seqlens_q);
  a.page_size = page_size;
  a.kind = summary_kind(op, kind);
  const bool known = group_reduce == "max" || group_reduce == "mean" || group_reduce == "sum";
  check(known, op, "group_reduce must be max, mean or sum, got ", group_reduce);
  a.reduce = group_reduce == "max"    ? selection::GroupReduce::max
             : group_reduce == "mean" ? selection::GroupReduce::mean
                                      : selection::GroupReduce::sum;
  a.causal = causal;
  a.scale = scale;
  check_floating(op, "q", a.q);
  check_shape(op, "q", a.q, "[total_q, Hq, D]", {-1, -1, -1});
  check(a.summary.ndim >= 2, op, "summary must begin with [num_pages, Hkv], got ",
        shape_of(a.summary));
  check_shape(op, "page_table", a.page_table, "[B, max_pages]", {-1, -1});
  Tensor scores = empty({a.q.shape[0], a.summary.shape[1], a.page_table.shape[1]},
                        accumulator(a.q.dtype), a.q.device);
  a.scores = view(op, "scores", scores);
  selection::score_pages(a, OpContext(op, a.q.device));
  return scores;
}

Tensor select_topk(const Tensor& scores, const OptionalTensor& lengths, int64_t k,
                   int64_t keep_first, int64_t keep_last, std::optional<double> threshold) {
  constexpr char op[] = "select_topk";
  selection::SelectArgs a;
  a.scores = view(op, "scores", scores);
  a.lengths = view(op, "lengths", lengths);
  a.keep_first = keep_first;
  a.keep_last = keep_last;
  if (threshold) a.threshold = *threshold;
  check(a.scores.ndim >= 1, op, "scores must have a dimension to select from");
  check(k >= 0, op, "k must not be negative, got ", k);
  TensorView like = a.scores;
  like.dtype = Dtype::i32;
  like.shape[like.ndim - 1] = k;
  Tensor out = empty_like(like);
  a.out = view(op, "out", out);
  selection::select_topk(a, OpContext(op, a.scores.device));
  return out;
}

Tensor evict(const Tensor& stats, const Tensor& seq_lens, const OptionalTensor& budgets,
             const OptionalTensor& num_protected, int64_t budget, int64_t keep_first,
             int64_t keep_last) {
  constexpr char op[] = "evict";
  selection::EvictArgs a;
  a.stats = view(op, "stats", stats);
  a.seq_lens = view(op, "seq_lens", seq_lens);
  a.budgets = view(op, "budget", budgets);
  a.num_protected = view(op, "num_protected", num_protected);
  a.keep_first = keep_first;
  a.keep_last = keep_last;
  check_shape(op, "stats", a.stats, "[B, Hkv, L]", {-1, -1, -1});
  check(budget >= 0, op, "budget must not be negative, got ", budget);
  Tensor keep = empty({a.stats.shape[0], a.stats.shape[1], budget}, Dtype::i32, a.stats.device);
  a.keep = view(op, "keep", keep);
  selection::evict(a, OpContext(op, a.stats.device));
  return keep;
}

selection::ColstatsArgs colstats_args(
    const char* op, const Tensor& q, const Tensor& k_cache, const OptionalTensor& page_table,
    const OptionalTensor& seq_lens, const OptionalTensor& cu_seqlens_q, const Tensor& lse,
    const OptionalTensor& head_window, const OptionalTensor& key_bias, const std::string& reduce,
    std::optional<double> threshold, double scale, bool causal, std::optional<int64_t> window,
    int64_t sink_tokens, double softcap) {
  const bool known = reduce == "sum" || reduce == "max" || reduce == "count";
  check(known, op, "reduce must be sum, max or count, got ", reduce);
  selection::ColstatsArgs a;
  a.attention = paged_attention_args(op, q, k_cache, k_cache, page_table, seq_lens, cu_seqlens_q,
                                     std::nullopt, head_window, key_bias, std::nullopt, scale,
                                     causal, window, sink_tokens, softcap, std::nullopt);
  a.attention.lse = view(op, "lse", lse);
  a.reduce = reduce == "sum"   ? selection::ColumnReduce::sum
             : reduce == "max" ? selection::ColumnReduce::max
                               : selection::ColumnReduce::count;
  check(!threshold || *threshold == *threshold, op, "threshold must not be NaN");
  if (threshold) a.threshold = *threshold;
  return a;
}

Tensor attention_colstats(const Tensor& q, const Tensor& k_cache, const OptionalTensor& page_table,
                          const OptionalTensor& seq_lens, const OptionalTensor& cu_seqlens_q,
                          const Tensor& lse, const OptionalTensor& head_window,
                          const OptionalTensor& key_bias, std::string reduce,
                          std::optional<double> threshold, double scale, bool causal,
                          std::optional<int64_t> window, int64_t sink_tokens, double softcap) {
  constexpr char op[] = "attention_colstats";
  selection::ColstatsArgs a =
      colstats_args(op, q, k_cache, page_table, seq_lens, cu_seqlens_q, lse, head_window, key_bias,
                    reduce, threshold, scale, causal, window, sink_tokens, softcap);
  const TensorView &k = a.attention.k_cache, &table = a.attention.page_table;
  check_floating(op, "q", a.attention.q);
  check(k.ndim == 4, op, "k_cache must have 4 dimensions, got ", shape_of(k));
  check(!given(table) || table.ndim == 2, op, "page_table must be [B, max_pages], got ",
        shape_of(table));
  Tensor stats = given(table) ? empty({table.shape[0], k.shape[2], table.shape[1] * k.shape[1]},
                                      accumulator(a.attention.q.dtype), k.device, true)
                              : empty({k.shape[0], k.shape[2], k.shape[1]},
                                      accumulator(a.attention.q.dtype), k.device, true);
  a.stats = view(op, "stats", stats);
  selection::attention_colstats(op, a, OpContext(op, k.device));
  return stats;
}

void accumulate_colstats(const Tensor& stats, const Tensor& q, const Tensor& k_cache,
                         const OptionalTensor& page_table, const OptionalTensor& seq_lens,
                         const OptionalTensor& cu_seqlens_q, const Tensor& lse,
                         const OptionalTensor& head_window, const OptionalTensor& key_bias,
                         std::string reduce, std::optional<double> threshold, double scale,
                         bool causal, std::optional<int64_t> window, int64_t sink_tokens,
                         double softcap, double decay) {
  constexpr char op[] = "attention_colstats";
  selection::ColstatsArgs a =
      colstats_args(op, q, k_cache, page_table, seq_lens, cu_seqlens_q, lse, head_window, key_bias,
                    reduce, threshold, scale, causal, window, sink_tokens, softcap);
  a.accumulate = true;
  a.decay = decay;
  a.stats = view(op, "accumulate_into", stats);
  selection::attention_colstats(op, a, OpContext(op, a.attention.k_cache.device));
}

std::tuple<Tensor, Tensor> knn_topk(const Tensor& q, const Tensor& bank,
                                    const OptionalTensor& valid_len, int64_t k, std::string metric,
                                    std::optional<int64_t> buckets) {
  constexpr char op[] = "knn_topk";
  selection::KnnArgs a;
  a.q = view(op, "q", q);
  a.bank = view(op, "bank", bank);
  a.valid_len = view(op, "valid_len", valid_len);
  const bool known = metric == "dot" || metric == "cosine" || metric == "l2";
  check(known, op, "metric must be dot, cosine or l2, got ", metric);
  a.metric = metric == "dot"      ? selection::Metric::dot
             : metric == "cosine" ? selection::Metric::cosine
                                  : selection::Metric::l2;
  check(k >= 0, op, "k must not be negative, got ", k);
  check(!buckets || *buckets >= 1, op, "buckets must be at least 1, got ", buckets.value_or(0));
  a.buckets = buckets.value_or(0);
  check_floating(op, "q", a.q);
  check_shape(op, "q", a.q, "[Q, H, D]", {-1, -1, -1});
  Tensor values = empty({a.q.shape[0], a.q.shape[1], k}, accumulator(a.q.dtype), a.q.device);
  Tensor indices = empty({a.q.shape[0], a.q.shape[1], k}, Dtype::i64, a.q.device);
  a.values = view(op, "values", values);
  a.indices = view(op, "indices", indices);
  selection::knn_topk(a, OpContext(op, a.q.device));
  return {values, indices};
}

// Keys [N, D] of one sequence, or with two leading dimensions, as a cache of one head. `offsets`
// are those of the queries of one sequence, if that is all there is.
selection::IndexerArgs indexer_args(const char* op, const Tensor& q, const Tensor& w,
                                    const Tensor& k, const OptionalTensor& page_table,
                                    const OptionalTensor& seq_lens,
                                    const OptionalTensor& cu_seqlens_q, bool causal,
                                    int64_t (&offsets)[2]) {
  selection::IndexerArgs a;
  attention::PagedAttentionArgs& inputs = a.attention;
  inputs.q = view(op, "q", q);
  inputs.page_table = view(op, "page_table", page_table);
  inputs.seq_lens = view(op, "seq_lens", seq_lens);
  inputs.cu_seqlens_q = view(op, "cu_seqlens_q", cu_seqlens_q);
  inputs.causal = causal;
  a.w = view(op, "w", w);
  check_floating(op, "q", inputs.q);
  check_shape(op, "q", inputs.q, "[T, Hi, D]", {-1, -1, -1});
  TensorView keys = view(op, "k", k);
  check(keys.ndim == 2 || keys.ndim == 3, op,
        "k must be [N, D], [num_pages, page_size, D] or [B, Lmax, D], got ", shape_of(keys));
  check_dtype(op, "k", keys, inputs.q.dtype);
  check_device(op, "k", keys, inputs.q.device);
  check_rows_contiguous(op, "k", keys);
  check(keys.shape[keys.ndim - 1] == inputs.q.shape[2], op, "k has head dim ",
        keys.shape[keys.ndim - 1], ", q has ", inputs.q.shape[2]);
  check(inputs.q.shape[1] > 0, op, "q has no heads");
  if (keys.ndim == 2) {
    const bool alone = !page_table && !seq_lens && !cu_seqlens_q;
    check(alone, op, "page_table, seq_lens and cu_seqlens_q must be None with k [N, D]");
    a.one_sequence = true;
    offsets[1] = inputs.q.shape[0];
    inputs.cu_seqlens_q = TensorView{offsets, Dtype::i64, inputs.q.device, 1, {2}, {1}};
    for (int i = 2; i > 0; --i) {
      keys.shape[i] = keys.shape[i - 1];
      keys.stride[i] = keys.stride[i - 1];
    }
    keys.shape[0] = 1;
    keys.ndim = 3;
  }
  const TensorView& offsets_q = inputs.cu_seqlens_q;
  const int64_t implied = given(offsets_q) ? numel(offsets_q) - 1 : inputs.q.shape[0];
  check(given(inputs.page_table) || keys.shape[0] == implied, op, "k has ", keys.shape[0],
        " sequences, ", given(offsets_q) ? "cu_seqlens_q" : "q", " implies ", implied);
  keys.shape[3] = keys.shape[2];
  keys.stride[3] = keys.stride[2];
  keys.shape[2] = 1;
  keys.ndim = 4;
  inputs.k_cache = inputs.v_cache = keys;
  return a;
}

Tensor indexer_scores(const Tensor& q, const Tensor& w, const Tensor& k,
                      const OptionalTensor& page_table, const OptionalTensor& seq_lens,
                      const OptionalTensor& cu_seqlens_q, bool causal) {
  constexpr char op[] = "indexer_scores";
  int64_t offsets[2] = {};
  selection::IndexerArgs a =
      indexer_args(op, q, w, k, page_table, seq_lens, cu_seqlens_q, causal, offsets);
  const TensorView& table = a.attention.page_table;
  check(!given(table) || table.ndim == 2, op, "page_table must be [B, max_pages], got ",
        shape_of(table));
  const int64_t capacity = a.attention.k_cache.shape[1] * (given(table) ? table.shape[1] : 1);
  Tensor scores = empty({a.attention.q.shape[0], capacity}, accumulator(a.attention.q.dtype),
                        a.attention.q.device);
  a.scores = view(op, "scores", scores);
  selection::indexer_scores(a, OpContext(op, a.attention.q.device));
  return scores;
}

// Bits of `needs`: q, w, k. What is not needed comes back empty.
std::tuple<Tensor, Tensor, Tensor> indexer_scores_backward(const Tensor& dscores, const Tensor& q,
                                                           const Tensor& w, const Tensor& k,
                                                           const OptionalTensor& page_table,
                                                           const OptionalTensor& seq_lens,
                                                           const OptionalTensor& cu_seqlens_q,
                                                           int64_t needs, bool causal) {
  constexpr char op[] = "indexer_scores_backward";
  int64_t offsets[2] = {};
  selection::IndexerArgs a =
      indexer_args(op, q, w, k, page_table, seq_lens, cu_seqlens_q, causal, offsets);
  a.scores = view(op, "dscores", dscores);
  selection::IndexerGrads grads;
  Tensor dq = gradient(op, needs, 0, a.attention.q, grads.dq);
  Tensor dw = gradient(op, needs, 1, a.w, grads.dw);
  Tensor dk = gradient(op, needs, 2, view(op, "k", k), grads.dk);
  selection::indexer_scores_backward(a, grads, OpContext(op, a.attention.q.device));
  return {dq, dw, dk};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(MEMKERNELS_NAMESPACE, m) {
  m.def(
      "summarize_keys(Tensor k_cache, Tensor page_table, Tensor seq_lens, *, str kind) -> Tensor");
  m.def(
      "update_summaries(Tensor(a!) summary, Tensor k_cache, Tensor page_table, Tensor seq_lens, "
      "Tensor? num_new_each, *, int num_new=0) -> ()");
  m.def(
      "score_pages(Tensor q, Tensor summary, Tensor page_table, Tensor seq_lens, "
      "Tensor? cu_seqlens_q, *, int page_size, str kind, str group_reduce, bool causal, "
      "float scale) -> Tensor");
  m.def(
      "select_topk(Tensor scores, Tensor? lengths, *, int k, int keep_first=0, int keep_last=0, "
      "float? threshold=None) -> Tensor");
  m.def(
      "evict(Tensor stats, Tensor seq_lens, Tensor? budgets, Tensor? num_protected, *, int budget, "
      "int keep_first=0, "
      "int keep_last=0) -> Tensor");
  m.def(
      "attention_colstats(Tensor q, Tensor k_cache, Tensor? page_table, Tensor? seq_lens, "
      "Tensor? cu_seqlens_q, Tensor lse, Tensor? head_window, Tensor? key_bias, *, str reduce, "
      "float? threshold, float scale, bool causal=True, int? window=None, int sink_tokens=0, "
      "float softcap=0.0) -> Tensor");
  m.def(
      "accumulate_colstats(Tensor(a!) stats, Tensor q, Tensor k_cache, Tensor? page_table, "
      "Tensor? seq_lens, Tensor? cu_seqlens_q, Tensor lse, Tensor? head_window, "
      "Tensor? key_bias, *, str reduce, float? threshold, float scale, bool causal=True, "
      "int? window=None, int sink_tokens=0, float softcap=0.0, float decay=1.0) -> ()");
  m.def(
      "knn_topk(Tensor q, Tensor bank, Tensor? valid_len, *, int k, str metric, int? buckets) "
      "-> (Tensor values, Tensor indices)");
  m.def(
      "indexer_scores(Tensor q, Tensor w, Tensor k, Tensor? page_table, Tensor? seq_lens, "
      "Tensor? cu_seqlens_q, *, bool causal) -> Tensor");
  m.def(
      "indexer_scores_backward(Tensor dscores, Tensor q, Tensor w, Tensor k, "
      "Tensor? page_table, Tensor? seq_lens, Tensor? cu_seqlens_q, *, int needs, bool causal) "
      "-> (Tensor dq, Tensor dw, Tensor dk)");
}

template <class Library>
static void implement(Library& m) {
  m.impl("summarize_keys", TORCH_BOX(&summarize_keys));
  m.impl("update_summaries", TORCH_BOX(&update_summaries));
  m.impl("score_pages", TORCH_BOX(&score_pages));
  m.impl("select_topk", TORCH_BOX(&select_topk));
  m.impl("evict", TORCH_BOX(&evict));
  m.impl("attention_colstats", TORCH_BOX(&attention_colstats));
  m.impl("accumulate_colstats", TORCH_BOX(&accumulate_colstats));
  m.impl("knn_topk", TORCH_BOX(&knn_topk));
  m.impl("indexer_scores", TORCH_BOX(&indexer_scores));
  m.impl("indexer_scores_backward", TORCH_BOX(&indexer_scores_backward));
}

STABLE_TORCH_LIBRARY_IMPL(MEMKERNELS_NAMESPACE, CPU, m) { implement(m); }

#if defined(MEMKERNELS_WITH_CUDA) && !defined(MEMKERNELS_SIMT)
STABLE_TORCH_LIBRARY_IMPL(MEMKERNELS_NAMESPACE, CUDA, m) { implement(m); }
#endif

}  // namespace memkernels::binding
