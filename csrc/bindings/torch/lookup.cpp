// Torch ops of the lookup family: schemas and adapters.
#include <string>
#include <tuple>
#include <vector>

#include "bindings/torch/convert.h"
#include "core/check.h"
#include "lookup/bags.h"
#include "lookup/embedding_bag.h"
#include "lookup/engram_gate.h"
#include "lookup/lsh_codes.h"
#include "lookup/ngram_hash.h"
#include "lookup/product_key_topk.h"
#include "lookup/row_update.h"
#include "lookup/sparse_ffn.h"

namespace memkernels::binding {

namespace {

std::tuple<Tensor, Tensor> product_key_topk(const Tensor& query, const Tensor& keys, int64_t k) {
  constexpr char op[] = "product_key_topk";
  lookup::ProductKeyArgs a;
  a.query = view(op, "query", query);
  a.keys = view(op, "keys", keys);
  check_floating(op, "query", a.query);
  check_shape(op, "query", a.query, "[T, H, 2, Dk]", {-1, -1, 2, -1});
  check(k >= 1 && k <= 128, op, "k must be 1 to 128, got ", k);
  const int64_t tokens = a.query.shape[0], heads = a.query.shape[1];
  Tensor scores = empty({tokens, heads, k}, accumulator(a.query.dtype), a.query.device);
  Tensor indices = empty({tokens, heads, k}, Dtype::i64, a.query.device);
  a.scores = view(op, "scores", scores);
  a.indices = view(op, "indices", indices);
  lookup::product_key_topk(a, OpContext(op, a.query.device));
  return {scores, indices};
}

lookup::Bags bags(const char* op, const Tensor& input, const OptionalTensor& offsets,
                  const OptionalTensor& factors) {
  return {view(op, "input", input), view(op, "offsets", offsets),
          view(op, "per_sample_weights", factors)};
}

// `sparse` is the gradient's matter.
Tensor embedding_bag(const Tensor& input, const Tensor& weight, const OptionalTensor& offsets,
                     const OptionalTensor& per_sample_weights, const OptionalTensor& scales,
                     bool /*sparse*/) {
  constexpr char op[] = "embedding_bag";
  lookup::EmbeddingBagArgs a;
  a.bags = bags(op, input, offsets, per_sample_weights);
  a.weight = view(op, "weight", weight);
  a.scales = view(op, "scales", scales);
  check(a.bags.input.ndim >= 1, op, "input must be [T, K], or [n] with offsets, got a number");
  check_shape(op, "weight", a.weight, "[N, D]", {-1, -1});
  const bool floating = is_floating(a.weight.dtype);
  Tensor out = empty({lookup::num_bags(a.bags), a.weight.shape[1]},
                     floating ? a.weight.dtype : Dtype::f32, a.bags.input.device);
  a.out = view(op, "out", out);
  lookup::embedding_bag(a, OpContext(op, a.bags.input.device));
  return out;
}

lookup::EmbeddingBagGrads bag_grads(const char* op, const Tensor& grad, const Tensor& input,
                                    const OptionalTensor& offsets,
                                    const OptionalTensor& per_sample_weights) {
  lookup::EmbeddingBagGrads a;
  a.bags = bags(op, input, offsets, per_sample_weights);
  a.grad = view(op, "grad", grad);
  check_floating(op, "grad", a.grad);
  check_shape(op, "grad", a.grad, "[T, D]", {-1, -1});
  return a;
}

std::tuple<Tensor, Tensor, Tensor> embedding_bag_backward(const Tensor& grad, const Tensor& input,
                                                          const OptionalTensor& offsets,
                                                          const OptionalTensor& per_sample_weights,
                                                          int64_t num_embeddings) {
  constexpr char op[] = "embedding_bag_backward";
  lookup::EmbeddingBagGrads a = bag_grads(op, grad, input, offsets, per_sample_weights);
  check(num_embeddings >= 0, op, "num_embeddings must not be negative, got ", num_embeddings);
  const int64_t size = numel(a.bags.input);
  Tensor rows = empty({size}, Dtype::i64, a.grad.device);
  const int64_t dim = a.grad.shape[1];
  const Dtype sums = accumulator(a.grad.dtype);
  // CUDA kernels also write what is not used.
  Tensor grads = a.grad.device.type == DeviceType::cuda
                     ? empty({size, dim}, sums, a.grad.device)
                     : sparse_zeros({size, dim}, sums, a.grad.device);
  Tensor count = empty({1}, Dtype::i64, a.grad.device);
  a.rows = view(op, "rows", rows);
  a.grads = view(op, "grads", grads);
  a.count = view(op, "count", count);
  lookup::embedding_bag_backward(op, a, num_embeddings, OpContext(op, a.grad.device));
  return {rows, grads, count};
}

Tensor embedding_bag_dense(const Tensor& grad, const Tensor& input, const OptionalTensor& offsets,
                           const OptionalTensor& per_sample_weights, int64_t num_embeddings) {
  constexpr char op[] = "embedding_bag_backward";
  lookup::EmbeddingBagGrads a = bag_grads(op, grad, input, offsets, per_sample_weights);
  check(num_embeddings >= 0, op, "num_embeddings must not be negative, got ", num_embeddings);
  Tensor dense = sparse_zeros({num_embeddings, a.grad.shape[1]}, a.grad.dtype, a.grad.device);
  a.dense = view(op, "dense", dense);
  lookup::embedding_bag_backward(op, a, num_embeddings, OpContext(op, a.grad.device));
  return dense;
}

void embedding_bag_accumulate(const Tensor& out, const Tensor& grad, const Tensor& input,
                              const OptionalTensor& offsets,
                              const OptionalTensor& per_sample_weights) {
  constexpr char op[] = "embedding_bag_backward";
  lookup::EmbeddingBagGrads a = bag_grads(op, grad, input, offsets, per_sample_weights);
  a.dense = view(op, "out", out);
  a.accumulate = true;
  check_shape(op, "out", a.dense, "[N, D]", {-1, -1});
  lookup::embedding_bag_backward(op, a, a.dense.shape[0], OpContext(op, a.grad.device));
}

Tensor embedding_bag_weights(const Tensor& grad, const Tensor& input, const Tensor& weight,
                             const OptionalTensor& offsets, const OptionalTensor& scales) {
  constexpr char op[] = "embedding_bag_weights";
  lookup::EmbeddingBagWeightsArgs a;
  a.bags = bags(op, input, offsets, std::nullopt);
  a.grad = view(op, "grad", grad);
  a.weight = view(op, "weight", weight);
  a.scales = view(op, "scales", scales);
  TensorView like = a.bags.input;
  like.dtype = accumulator(a.weight.dtype);
  Tensor out = empty_like(like);
  a.out = view(op, "out", out);
  lookup::embedding_bag_weights(a, OpContext(op, a.bags.input.device));
  return out;
}

lookup::SparseFfnArgs ffn_args(const char* op, const Tensor& x, const Tensor& up,
                               const Tensor& down, const Tensor& indices,
                               const OptionalTensor& weights, const std::string& activation) {
  using lookup::Activation;
  lookup::SparseFfnArgs a;
  a.x = view(op, "x", x);
  a.up = view(op, "up", up);
  a.down = view(op, "down", down);
  a.indices = view(op, "indices", indices);
  a.weights = view(op, "weights", weights);
  static const struct {
    const char* name;
    Activation activation;
  } kActivations[] = {{"gelu", Activation::gelu},
                      {"gelu_tanh", Activation::gelu_tanh},
                      {"silu", Activation::silu},
                      {"relu", Activation::relu},
                      {"none", Activation::none}};
  bool known = false;
  for (const auto& candidate : kActivations) {
    if (activation != candidate.name) continue;
    a.activation = candidate.activation;
    known = true;
  }
  check(known, op, "activation must be gelu, gelu_tanh, silu, relu or none, got ", activation);
  check_shape(op, "x", a.x, "[T, D]", {-1, -1});
  check_shape(op, "down", a.down, "[N, Dout]", {-1, -1});
  return a;
}

Tensor sparse_ffn(const Tensor& x, const Tensor& up, const Tensor& down, const Tensor& indices,
                  const OptionalTensor& weights, std::string activation) {
  constexpr char op[] = "sparse_ffn";
  lookup::SparseFfnArgs a = ffn_args(op, x, up, down, indices, weights, activation);
  Tensor out = empty({a.x.shape[0], a.down.shape[1]}, a.x.dtype, a.x.device);
  a.out = view(op, "out", out);
  lookup::sparse_ffn(a, OpContext(op, a.x.device));
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sparse_ffn_backward(
    const Tensor& dy, const Tensor& x, const Tensor& up, const Tensor& down, const Tensor& indices,
    const OptionalTensor& weights, int64_t needs, std::string activation) {
  constexpr char op[] = "sparse_ffn_backward";
  const lookup::SparseFfnArgs a = ffn_args(op, x, up, down, indices, weights, activation);
  TensorView factors = a.indices;
  factors.dtype = accumulator(a.x.dtype);
  lookup::SparseFfnGrads grads;
  Tensor dx = gradient(op, needs, 0, a.x, grads.dx), dweights = empty_like(factors);
  Tensor up_factors = empty_like(factors), down_factors = empty_like(factors);
  grads.dy = view(op, "dy", dy);
  grads.dweights = view(op, "dweights", dweights);
  grads.up_factors = view(op, "up_factors", up_factors);
  grads.down_factors = view(op, "down_factors", down_factors);
  lookup::sparse_ffn_backward(a, grads, OpContext(op, a.x.device));
  return {dx, dweights, up_factors, down_factors};
}

Tensor ngram_hash(const Tensor& token_ids, const Tensor& multipliers, const Tensor& moduli,
                  const Tensor& offsets, const OptionalTensor& past_ids,
                  const OptionalTensor& cu_seqlens, std::vector<int64_t> orders,
                  std::optional<int64_t> eos_id, int64_t pad_id) {
  constexpr char op[] = "ngram_hash";
  lookup::NgramHashArgs a;
  a.token_ids = view(op, "token_ids", token_ids);
  a.multipliers = view(op, "multipliers", multipliers);
  a.moduli = view(op, "moduli", moduli);
  a.offsets = view(op, "offsets", offsets);
  a.past_ids = view(op, "past_ids", past_ids);
  a.cu_seqlens = view(op, "cu_seqlens", cu_seqlens);
  a.orders = orders.data();
  a.num_orders = static_cast<int64_t>(orders.size());
  a.eos_id = eos_id.value_or(-1);
  a.pad_id = pad_id;
  check_shape(op, "token_ids", a.token_ids, "[B, T]", {-1, -1});
  check_shape(op, "moduli", a.moduli, "[len(orders) * heads]", {-1});
  const int64_t* shape = a.token_ids.shape;
  Tensor rows = empty({shape[0], shape[1], a.moduli.shape[0]}, Dtype::i64, a.token_ids.device);
  a.rows = view(op, "rows", rows);
  lookup::ngram_hash(a, OpContext(op, a.token_ids.device));
  return rows;
}

lookup::EngramGateArgs gate_args(const char* op, const Tensor& hidden, const Tensor& k,
                                 const Tensor& v, const Tensor& weight, double eps,
                                 const std::string& sign) {
  lookup::EngramGateArgs a;
  a.hidden = view(op, "hidden", hidden);
  a.k = view(op, "k", k);
  a.v = view(op, "v", v);
  a.weight = view(op, "weight", weight);
  a.eps = eps;
  check(sign == "zero" || sign == "copy", op, "sign must be zero or copy, got ", sign);
  a.sign = sign == "zero" ? lookup::ZeroSign::zero : lookup::ZeroSign::copy;
  return a;
}

Tensor engram_gate(const Tensor& hidden, const Tensor& k, const Tensor& v, const Tensor& weight,
                   double eps, std::string sign) {
  constexpr char op[] = "engram_gate";
  lookup::EngramGateArgs a = gate_args(op, hidden, k, v, weight, eps, sign);
  check_floating(op, "hidden", a.hidden);
  Tensor out = empty_like(a.hidden);
  a.out = view(op, "out", out);
  lookup::engram_gate(a, OpContext(op, a.hidden.device));
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> engram_gate_backward(const Tensor& dout,
                                                                const Tensor& hidden,
                                                                const Tensor& k, const Tensor& v,
                                                                const Tensor& weight, int64_t needs,
                                                                double eps, std::string sign) {
  constexpr char op[] = "engram_gate_backward";
  const lookup::EngramGateArgs a = gate_args(op, hidden, k, v, weight, eps, sign);
  lookup::EngramGateGrads g;
  g.dout = view(op, "dout", dout);
  Tensor dhidden = gradient(op, needs, 0, a.hidden, g.dhidden),
         dk = gradient(op, needs, 1, a.k, g.dk);
  Tensor dv = gradient(op, needs, 2, a.v, g.dv),
         dweight = gradient(op, needs, 3, a.weight, g.dweight);
  lookup::engram_gate_backward(a, g, OpContext(op, a.hidden.device));
  return {dhidden, dk, dv, dweight};
}

std::tuple<Tensor, Tensor> lsh_codes(const Tensor& z) {
  constexpr char op[] = "lsh_codes";
  lookup::LshCodesArgs a;
  a.z = view(op, "z", z);
  check_floating(op, "z", a.z);
  check_shape(op, "z", a.z, "[T, tables, bits]", {-1, -1, -1});
  Tensor codes = empty({a.z.shape[0], a.z.shape[1]}, Dtype::i32, a.z.device);
  Tensor scores = empty({a.z.shape[0], a.z.shape[1]}, accumulator(a.z.dtype), a.z.device);
  a.codes = view(op, "codes", codes);
  a.scores = view(op, "scores", scores);
  lookup::lsh_codes(a, OpContext(op, a.z.device));
  return {codes, scores};
}

Tensor lsh_codes_backward(const Tensor& dscores, const Tensor& z) {
  constexpr char op[] = "lsh_codes_backward";
  lookup::LshCodesArgs a;
  lookup::LshCodesGrads g;
  a.z = view(op, "z", z);
  g.dscores = view(op, "dscores", dscores);
  Tensor dz = empty_like(a.z);
  g.dz = view(op, "dz", dz);
  lookup::lsh_codes_backward(a, g, OpContext(op, a.z.device));
  return dz;
}

// ---- optimisers of rows ----

lookup::RowUpdateArgs update_args(const char* op, const Tensor& param, const Tensor& rows,
                                  const Tensor& grads, const Tensor& count, double lr) {
  lookup::RowUpdateArgs a;
  a.param = view(op, "param", param);
  a.rows = view(op, "rows", rows);
  a.grads = view(op, "grads", grads);
  a.count = view(op, "count", count);
  a.lr = lr;
  return a;
}

void row_sgd(const Tensor& param, const Tensor& rows, const Tensor& grads, const Tensor& count,
             double lr, double weight_decay) {
  constexpr char op[] = "row_sgd";
  lookup::RowUpdateArgs a = update_args(op, param, rows, grads, count, lr);
  a.weight_decay = weight_decay;
  lookup::row_update(op, a, OpContext(op, a.param.device));
}

void row_adagrad(const Tensor& param, const Tensor& sum, const Tensor& rows, const Tensor& grads,
                 const Tensor& count, double lr, double eps) {
  constexpr char op[] = "row_adagrad";
  lookup::RowUpdateArgs a = update_args(op, param, rows, grads, count, lr);
  a.optimiser = lookup::Optimiser::adagrad;
  a.first = view(op, "sum", sum);
  a.eps = eps;
  lookup::row_update(op, a, OpContext(op, a.param.device));
}

void row_adam(const Tensor& param, const Tensor& exp_avg, const Tensor& exp_avg_sq,
              const Tensor& rows, const Tensor& grads, const Tensor& count, int64_t step, double lr,
              double beta1, double beta2, double eps, double weight_decay) {
  constexpr char op[] = "row_adam";
  lookup::RowUpdateArgs a = update_args(op, param, rows, grads, count, lr);
  a.optimiser = lookup::Optimiser::adam;
  a.first = view(op, "exp_avg", exp_avg);
  a.second = view(op, "exp_avg_sq", exp_avg_sq);
  a.step = step;
  a.beta1 = beta1;
  a.beta2 = beta2;
  a.eps = eps;
  a.weight_decay = weight_decay;
  lookup::row_update(op, a, OpContext(op, a.param.device));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(MEMKERNELS_NAMESPACE, m) {
  m.def("product_key_topk(Tensor query, Tensor keys, *, int k) -> (Tensor scores, Tensor indices)");
  m.def(
      "embedding_bag(Tensor input, Tensor weight, Tensor? offsets, Tensor? per_sample_weights, "
      "Tensor? scales, *, bool sparse=False) -> Tensor");
  m.def(
      "embedding_bag_backward(Tensor grad, Tensor input, Tensor? offsets, Tensor? "
      "per_sample_weights, "
      "*, int num_embeddings) -> (Tensor rows, Tensor grads, Tensor count)");
  m.def(
      "embedding_bag_dense(Tensor grad, Tensor input, Tensor? offsets, Tensor? per_sample_weights, "
      "*, int num_embeddings) -> Tensor");
  m.def(
      "embedding_bag_accumulate(Tensor(a!) out, Tensor grad, Tensor input, Tensor? offsets, "
      "Tensor? per_sample_weights) -> ()");
  m.def(
      "embedding_bag_weights(Tensor grad, Tensor input, Tensor weight, Tensor? offsets, Tensor? "
      "scales) -> Tensor");
  m.def(
      "row_sgd(Tensor(a!) param, Tensor rows, Tensor grads, Tensor count, *, float lr, "
      "float weight_decay=0.0) -> ()");
  m.def(
      "row_adagrad(Tensor(a!) param, Tensor(b!) sum, Tensor rows, Tensor grads, Tensor count, *, "
      "float lr, float eps) -> ()");
  m.def(
      "row_adam(Tensor(a!) param, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor rows, "
      "Tensor grads, Tensor count, *, int step, float lr, float beta1, float beta2, float eps, "
      "float weight_decay=0.0) -> ()");
  m.def(
      "ngram_hash(Tensor token_ids, Tensor multipliers, Tensor moduli, Tensor offsets, "
      "Tensor? past_ids, Tensor? cu_seqlens, *, int[] orders, int? eos_id=None, int pad_id=0) "
      "-> Tensor");
  m.def(
      "engram_gate(Tensor hidden, Tensor k, Tensor v, Tensor weight, *, float eps, str sign) "
      "-> Tensor");
  m.def(
      "engram_gate_backward(Tensor dout, Tensor hidden, Tensor k, Tensor v, Tensor weight, *, "
      "int needs, float eps, str sign) -> (Tensor dhidden, Tensor dk, Tensor dv, Tensor dweight)");
  m.def("lsh_codes(Tensor z) -> (Tensor codes, Tensor scores)");
  m.def("lsh_codes_backward(Tensor dscores, Tensor z) -> Tensor");
  m.def(
      "sparse_ffn(Tensor x, Tensor up, Tensor down, Tensor indices, Tensor? weights, *, "
      "str activation) -> Tensor");
  m.def(
      "sparse_ffn_backward(Tensor dy, Tensor x, Tensor up, Tensor down, Tensor indices, "
      "Tensor? weights, *, int needs, str activation) "
      "-> (Tensor dx, Tensor dweights, Tensor up_factors, Tensor down_factors)");
}

template <class Library>
static void implement(Library& m) {
  m.impl("product_key_topk", TORCH_BOX(&product_key_topk));
  m.impl("embedding_bag", TORCH_BOX(&embedding_bag));
  m.impl("embedding_bag_backward", TORCH_BOX(&embedding_bag_backward));
  m.impl("embedding_bag_dense", TORCH_BOX(&embedding_bag_dense));
  m.impl("embedding_bag_accumulate", TORCH_BOX(&embedding_bag_accumulate));
  m.impl("embedding_bag_weights", TORCH_BOX(&embedding_bag_weights));
  m.impl("sparse_ffn", TORCH_BOX(&sparse_ffn));
  m.impl("sparse_ffn_backward", TORCH_BOX(&sparse_ffn_backward));
  m.impl("ngram_hash", TORCH_BOX(&ngram_hash));
  m.impl("engram_gate", TORCH_BOX(&engram_gate));
  m.impl("engram_gate_backward", TORCH_BOX(&engram_gate_backward));
  m.impl("lsh_codes", TORCH_BOX(&lsh_codes));
  m.impl("lsh_codes_backward", TORCH_BOX(&lsh_codes_backward));
  m.impl("row_sgd", TORCH_BOX(&row_sgd));
  m.impl("row_adagrad", TORCH_BOX(&row_adagrad));
  m.impl("row_adam", TORCH_BOX(&row_adam));
}

STABLE_TORCH_LIBRARY_IMPL(MEMKERNELS_NAMESPACE, CPU, m) { implement(m); }

#if defined(MEMKERNELS_WITH_CUDA) && !defined(MEMKERNELS_SIMT)
STABLE_TORCH_LIBRARY_IMPL(MEMKERNELS_NAMESPACE, CUDA, m) { implement(m); }
#endif

}  // namespace memkernels::binding
