#include "attention/plan.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "core/check.h"
#include "core/cuda/host_copy.h"

namespace memkernels::attention {

namespace {

constexpr int64_t kMaxHeadDim = 576;

void check_optional_index(const char* op, const char* arg, const TensorView& t, Device device) {
  check_index(op, arg, t);
  check_device(op, arg, t, device);
}

// Lengths from cumulative ones: [B + 1], starting at 0, never falling, ending at `total`.
void check_cumulative(const char* op, const char* arg, const TensorView& t, int64_t batch,
                      const char* rows_of, int64_t total) {
  check_shape(op, arg, t, "[B + 1]", {batch + 1});
  check(index_at(t, 0) == 0, op, arg, " must start at 0, got ", index_at(t, 0));
  for (int64_t b = 0; b < batch; ++b) {
    check(index_at(t, (b + 1) * t.stride[0]) >= index_at(t, b * t.stride[0]), op, arg,
          " must not fall, but does at ", b + 1);
  }
  check(index_at(t, batch * t.stride[0]) == total, op, arg, " ends at ",
        index_at(t, batch * t.stride[0]), ", ", rows_of, " has ", total, " rows");
}

int64_t pages_for(const PagedAttentionArgs& a, int64_t kv_len) {
  return kv_len / a.k_cache.shape[1] + (kv_len % a.k_cache.shape[1] != 0);
}

void check_page(const char* op, const PagedAttentionArgs& a, int64_t row, int64_t column) {
  const TensorView& table = a.page_table;
  const int64_t page = index_at(table, row * table.stride[0] + column * table.stride[1]);
  check(page >= -1 && page < a.k_cache.shape[0], op, "page_table[", row, ", ", column, "] = ", page,
        " is outside [-1, ", a.k_cache.shape[0], ")");
}

void check_page_table(const char* op, const PagedAttentionArgs& a, const Plan& plan) {
  for (size_t b = 0; b < plan.sequences.size(); ++b) {
    const int64_t used = pages_for(a, plan.sequences[b].kv_len);
    check(used <= a.page_table.shape[1], op, "seq_lens[", b, "] = ", plan.sequences[b].kv_len,
          " needs ", used, " pages of ", a.k_cache.shape[1], ", page_table has ",
          a.page_table.shape[1], " columns");
    if (given(a.indices)) continue;  // what is listed is checked alone
    for (int64_t i = 0; i < used; ++i) check_page(op, a, b, i);
  }
}

// Refuses a list of a query that leaves its sequence; returns how far its stream goes, up to the
// last key that the query sees.
int64_t checked_stream(const char* op, const PagedAttentionArgs& a, int64_t query, int64_t list,
                       const Sequence& s, int64_t unit) {
  const TensorView& indices = a.indices;
  const int64_t limit = a.index_pages ? pages_for(a, s.kv_len) : s.kv_len;
  int64_t length = 0;
  for (int64_t i = 0; i < indices.shape[2]; ++i) {
    const int64_t index = index_at(
        indices, query * indices.stride[0] + list * indices.stride[1] + i * indices.stride[2]);
    check(index >= -1 && index < limit, op, "indices[", query, ", ", list, ", ", i, "] = ", index,
          " is outside [-1, ", limit, "), the ", a.index_pages ? "pages" : "tokens",
          " of sequence ", s.row);
    const int64_t first = index * unit;
    if (index < 0 || first >= s.num_visible) continue;
    if (given(a.page_table)) check_page(op, a, s.row, first / a.k_cache.shape[1]);
    length = i * unit + std::min(unit, s.num_visible - first);
  }
  return length;
}

// From sequences to queries, each with the stream of keys its lists name.
void list_keys(const char* op, const PagedAttentionArgs& a, Plan& plan) {
  const TensorView& indices = a.indices;
  const int64_t lists = indices.shape[1];
  const int64_t unit = a.index_pages ? a.k_cache.shape[1] : 1;
  std::vector<Sequence> queries;
  for (const Sequence& s : plan.sequences) {
    for (int64_t i = 0; i < s.num_q; ++i) {
      Sequence query{s.q_begin + i, 1, s.kv_len, s.kv_begin, s.row, s.kv_len};
      if (a.causal) query.num_visible = std::max<int64_t>(0, s.kv_len - s.num_q + i + 1);
      int64_t length = 0;
      for (int64_t list = 0; list < lists; ++list) {
        length = std::max(length, checked_stream(op, a, query.q_begin, list, query, unit));
      }
      query.kv_len = length;
      queries.push_back(query);
    }
  }
  plan.sequences = std::move(queries);
  plan.problem.indices = {indices.data,      indices.dtype == Dtype::i64,
                          indices.stride[0], lists == 1 ? 0 : indices.stride[1],
                          indices.stride[2], unit};
}

}  // namespace

Rows rows_of(const TensorView& t, int leading) {
  Rows rows;
  if (!given(t)) return rows;
  rows.data = static_cast<char*>(t.data);
  rows.dtype = t.dtype;
  const bool has_outer = leading == 3;
  rows.outer_stride = has_outer ? t.stride[0] : 0;
  rows.token_stride = t.stride[has_outer];
  rows.head_stride = t.stride[has_outer + 1];
  return rows;
}

void check_query_offsets(const char* op, const TensorView& q, const TensorView& cu_seqlens_q,
                         int64_t batch) {
  if (given(cu_seqlens_q)) {
    check_shape(op, "cu_seqlens_q", cu_seqlens_q, "[B + 1]", {batch + 1});
    check_optional_index(op, "cu_seqlens_q", cu_seqlens_q, q.device);
    check(batch > 0 || q.shape[0] == 0, op, "q has ", q.shape[0],
          " rows, cu_seqlens_q implies no sequences");
  } else {
    check(q.shape[0] == batch, op, "q has ", q.shape[0], " rows without cu_seqlens_q, page_table ",
          batch);
  }
}

std::vector<int64_t> query_offsets(const char* op, const TensorView& q,
                                   const TensorView& cu_seqlens_q, int64_t batch) {
  if (given(cu_seqlens_q)) {
    check_cumulative(op, "cu_seqlens_q", cu_seqlens_q, batch, "q", q.shape[0]);
  }
  std::vector<int64_t> offsets(batch + 1);
  for (int64_t b = 0; b <= batch; ++b) {
    offsets[b] = given(cu_seqlens_q) ? index_at(cu_seqlens_q, b * cu_seqlens_q.stride[0]) : b;
  }
  return offsets;
}

int64_t sequence_of(const Plan& plan, int64_t token) {
  const auto after = std::upper_bound(plan.sequences.begin(), plan.sequences.end(), token,
                                      [](int64_t t, const Sequence& s) { return t < s.q_begin; });
  return after - plan.sequences.begin() - 1;
}

int workers_for(const Context& ctx, double multiply_adds) {
  constexpr double kWorthAWorker = 2e5;  // some 5 to 10 us of one core
  const double wanted = multiply_adds / kWorthAWorker;
  return wanted < ctx.num_workers ? std::max(1, static_cast<int>(wanted)) : ctx.num_workers;
}

Shapes check_shapes(const char* op, const PagedAttentionArgs& a) {
  const bool paged = given(a.page_table), packed = given(a.cu_seqlens_k);
  check(!(paged && packed), op, "cu_seqlens_k and page_table exclude each other");
  check(!(packed && given(a.seq_lens)), op,
        "seq_lens must be None with cu_seqlens_k, which gives the lengths");
  check(!paged || given(a.seq_lens), op, "seq_lens is needed with page_table");

  check_floating(op, "q", a.q);
  check_shape(op, "q", a.q, "[total_q, Hq, D]", {-1, -1, -1});
  const Dtype dtype = a.q.dtype;
  const Device device = a.q.device;
  const int64_t total_q = a.q.shape[0], heads = a.q.shape[1], dim = a.q.shape[2];
  check_rows_contiguous(op, "q", a.q);

  const char* layout = packed  ? "[total_k, Hkv, D]"
                       : paged ? "[num_pages, page_size, Hkv, D]"
                               : "[B, Lmax, Hkv, D]";
  const int kv_dims = packed ? 3 : 4;
  for (const auto& [arg, t] : {std::pair{"k_cache", &a.k_cache}, {"v_cache", &a.v_cache}}) {
    check(t->ndim == kv_dims, op, arg, " must be ", layout, ", got ", shape_of(*t));
    check_dtype(op, arg, *t, dtype);
    check_device(op, arg, *t, device);
    check_rows_contiguous(op, arg, *t);
  }
  const int64_t kv_heads = a.k_cache.shape[kv_dims - 2], dim_v = a.v_cache.shape[kv_dims - 1];
  check(a.k_cache.shape[kv_dims - 1] == dim, op, "k_cache has head dim ",
        a.k_cache.shape[kv_dims - 1], ", q has ", dim);
  for (int i = 0; i + 1 < kv_dims; ++i) {
    check(a.v_cache.shape[i] == a.k_cache.shape[i], op, "v_cache ", shape_of(a.v_cache),
          " must match k_cache ", shape_of(a.k_cache), " but for its last dimension");
  }
  check(dim >= 1 && dim <= kMaxHeadDim, op, "q has head dim ", dim, ", supported: 1 to ",
        kMaxHeadDim);
  check(dim_v >= 1 && dim_v <= kMaxHeadDim, op, "v_cache has head dim ", dim_v,
        ", supported: 1 to ", kMaxHeadDim);
  check(kv_heads > 0 && heads % kv_heads == 0, op, "q has ", heads,
        " heads, not a multiple of k_cache's ", kv_heads);
  check(!paged || a.k_cache.shape[1] > 0, op, "k_cache has page_size 0");

  // The batch size, as q, the lengths and the table each imply it.
  int64_t batch = total_q;
  const char* source = given(a.cu_seqlens_q) ? "cu_seqlens_q" : "q";
  if (given(a.cu_seqlens_q)) {
    check(a.cu_seqlens_q.ndim == 1 && a.cu_seqlens_q.shape[0] >= 1, op,
          "cu_seqlens_q must be [B + 1], got ", shape_of(a.cu_seqlens_q));
    check_optional_index(op, "cu_seqlens_q", a.cu_seqlens_q, device);
    batch = a.cu_seqlens_q.shape[0] - 1;
  }
  if (paged) {
    check(a.page_table.ndim == 2, op, "page_table must be [B, max_pages], got ",
          shape_of(a.page_table));
    check_optional_index(op, "page_table", a.page_table, device);
    check(a.page_table.shape[0] == batch, op, "page_table has ", a.page_table.shape[0], " rows, ",
          source, " implies ", batch, " sequences");
  } else if (packed) {
    check(a.cu_seqlens_k.ndim == 1 && a.cu_seqlens_k.shape[0] == batch + 1, op,
          "cu_seqlens_k must be [B + 1] with B = ", batch, " as ", source, " implies, got ",
          shape_of(a.cu_seqlens_k));
    check_optional_index(op, "cu_seqlens_k", a.cu_seqlens_k, device);
  } else {
    check(a.k_cache.shape[0] == batch, op, "k_cache has ", a.k_cache.shape[0], " sequences, ",
          source, " implies ", batch);
  }
  check(batch > 0 || total_q == 0, op, "q has ", total_q,
        " rows, cu_seqlens_q implies no sequences");
  if (given(a.seq_lens)) {
    check_shape(op, "seq_lens", a.seq_lens, "[B]", {batch});
    check_optional_index(op, "seq_lens", a.seq_lens, device);
  }

  if (given(a.indices)) {
    check(a.indices.ndim == 3 && a.indices.shape[0] == total_q &&
              (a.indices.shape[1] == kv_heads || a.indices.shape[1] == 1),
          op, "indices must be [total_q, Hkv, K] or [total_q, 1, K] with total_q = ", total_q,
          " and Hkv = ", kv_heads, ", got ", shape_of(a.indices));
    check_optional_index(op, "indices", a.indices, device);
    check(paged || !a.index_pages, op, "unit must be token without a page_table, got page");
  }
  if (given(a.head_window)) {
    check_shape(op, "window", a.head_window, "[Hkv]", {kv_heads});
    check_optional_index(op, "window", a.head_window, device);
  }
  check(a.window == -1 || a.window >= 1, op, "window must be at least 1, got ", a.window);
  check(a.sink_tokens >= 0, op, "sink_tokens must not be negative, got ", a.sink_tokens);
  check(a.softcap >= 0, op, "softcap must not be negative, got ", a.softcap);
  check(std::isfinite(a.scale), op, "scale must be finite, got ", a.scale);
  if (given(a.key_bias)) {
    bool same = a.key_bias.ndim == kv_dims - 1;
    for (int i = 0; same && i + 1 < kv_dims; ++i) same = a.key_bias.shape[i] == a.k_cache.shape[i];
    check(same, op, "key_bias must have k_cache's shape without its last dimension, got ",
          shape_of(a.key_bias), " beside ", shape_of(a.k_cache));
    check_companion(op, "key_bias", a.key_bias, dtype);
    check_device(op, "key_bias", a.key_bias, device);
  }
  if (given(a.sink_logit)) {
    check_shape(op, "sink_logit", a.sink_logit, "[Hq]", {heads});
    check_companion(op, "sink_logit", a.sink_logit, dtype);
    check_device(op, "sink_logit", a.sink_logit, device);
  }

  return {paged, packed, kv_dims, batch, total_q, heads, kv_heads, dim, dim_v};
}

void make_plan(const char* op, const PagedAttentionArgs& a, Plan& plan) {
  const auto [paged, packed, kv_dims, batch, total_q, heads, kv_heads, dim, dim_v] =
      check_shapes(op, a);
  if (given(a.cu_seqlens_q)) {
    check_cumulative(op, "cu_seqlens_q", a.cu_seqlens_q, batch, "q", total_q);
  }
  if (packed) {
    check_cumulative(op, "cu_seqlens_k", a.cu_seqlens_k, batch, "k_cache", a.k_cache.shape[0]);
  }

  plan.total_q = total_q;
  plan.sequences.resize(batch);
  for (int64_t b = 0; b < batch; ++b) {
    Sequence& s = plan.sequences[b];
    const auto at = [b](const TensorView& t, int64_t i) {
      return index_at(t, (b + i) * t.stride[0]);
    };
    s.q_begin = given(a.cu_seqlens_q) ? at(a.cu_seqlens_q, 0) : b;
    s.num_q = given(a.cu_seqlens_q) ? at(a.cu_seqlens_q, 1) - s.q_begin : 1;
    s.row = b;
    s.kv_begin = packed ? at(a.cu_seqlens_k, 0) : 0;
    s.kv_len = packed              ? at(a.cu_seqlens_k, 1) - s.kv_begin
               : given(a.seq_lens) ? at(a.seq_lens, 0)
                                   : a.k_cache.shape[1];
    check(s.kv_len >= 0, op, "seq_lens[", b, "] = ", s.kv_len, " is negative");
    check(paged || packed || s.kv_len <= a.k_cache.shape[1], op, "seq_lens[", b, "] = ", s.kv_len,
          " exceeds k_cache's ", a.k_cache.shape[1], " tokens");
    check(a.max_seqlen < 0 || s.kv_len <= a.max_seqlen, op, "max_seqlen = ", a.max_seqlen,
          " is less than the length ", s.kv_len, " of sequence ", b);
  }
  if (paged) check_page_table(op, a, plan);
  if (given(a.indices)) list_keys(op, a, plan);

  plan.window.assign(kv_heads, a.window < 0 ? kNoWindow : a.window);
  if (given(a.head_window)) {
    for (int64_t h = 0; h < kv_heads; ++h) {
      plan.window[h] = index_at(a.head_window, h * a.head_window.stride[0]);
      check(plan.window[h] >= 1, op, "window[", h, "] must be at least 1, got ", plan.window[h]);
    }
  }
  if (given(a.sink_logit)) {
    plan.sink_logit.resize(heads);
    for (int64_t h = 0; h < heads; ++h) {
      plan.sink_logit[h] =
          load_scalar(a.sink_logit.data, a.sink_logit.dtype, h * a.sink_logit.stride[0]);
    }
  }

  Problem& p = plan.problem;
  p.dtype = a.q.dtype;
  p.num_heads = heads;
  p.num_kv_heads = kv_heads;
  p.group = heads / kv_heads;
  p.dim = dim;
  p.dim_v = dim_v;
  p.q = rows_of(a.q, 2);
  p.k = rows_of(a.k_cache, kv_dims - 1);
  p.v = rows_of(a.v_cache, kv_dims - 1);
  p.key_bias = rows_of(a.key_bias, kv_dims - 1);
  p.out = rows_of(a.out, 2);
  p.lse = rows_of(a.lse, 2);
  p.page_table = paged ? a.page_table.data : nullptr;
  p.wide_table = paged && a.page_table.dtype == Dtype::i64;
  p.table_row_stride = paged ? a.page_table.stride[0] : 0;
  p.table_stride = paged ? a.page_table.stride[1] : 0;
  p.page_size = packed ? 0 : a.k_cache.shape[1];
  p.packed = packed;
  p.scale = a.scale;
  p.softcap = a.softcap;
  p.causal = a.causal;
  p.sink_tokens = a.sink_tokens;
  p.window = plan.window.data();
  p.same_window = std::all_of(plan.window.begin(), plan.window.end(),
                              [&](int64_t w) { return w == plan.window[0]; });
  p.sink_logit = plan.sink_logit.empty() ? nullptr : plan.sink_logit.data();
  p.sequences = plan.sequences.data();
  p.num_sequences = static_cast<int64_t>(plan.sequences.size());
}

#ifdef MEMKERNELS_WITH_CUDA
Shapes check_on_cuda(const char* op, const PagedAttentionArgs& args, const Context& ctx) {
  if (ctx.check_indices) {
    HostCopies copies(op, ctx);
    PagedAttentionArgs read = args;
    for (TensorView* t : {&read.page_table, &read.seq_lens, &read.cu_seqlens_q, &read.cu_seqlens_k,
                          &read.head_window, &read.indices, &read.sink_logit}) {
      copies.replace(*t);
    }
    Plan plan;
    make_plan(op, read, plan);
  }
  return check_shapes(op, args);
}
#endif

}  // namespace memkernels::attention
