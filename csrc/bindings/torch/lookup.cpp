// Torch ops of the lookup family: schemas and adapters.
#include <string>

#include "bindings/torch/convert.h"
#include "core/check.h"

namespace memkernels::binding {

STABLE_TORCH_LIBRARY_FRAGMENT(MEMKERNELS_NAMESPACE, m) {
  m.def("product_key_topk(Tensor query, Tensor keys, *, int k) -> (Tensor scores, Tensor indices)");
  m.def(
      "embedding_bag(Tensor input, Tensor weight, Tensor? offsets, Tensor? per_sample_weights, "
      "Tensor? scales, *, bool sparse=False) -> Tensor");
  m.def(
      "embedding_bag_rows(Tensor grad, Tensor input, Tensor? offsets, Tensor? per_sample_weights, "
      "*, int num_embeddings) -> (Tensor rows, Tensor grads, Tensor count)");
  m.def(
      "embedding_bag_dense(Tensor grad, Tensor input, Tensor? offsets, Tensor? per_sample_weights, "
      "*, int num_embeddings) -> Tensor");
  m.def(
      "embedding_bag_accumulate(Tensor(a!) out, Tensor grad, Tensor input, Tensor? offsets, "
      "Tensor? per_sample_weights) -> ()");
  m.def(
      "embedding_bag_weights(Tensor grad, Tensor input, Tensor weight, Tensor? offsets) -> Tensor");
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
      "float eps, str sign) -> (Tensor dhidden, Tensor dk, Tensor dv, Tensor dweight)");
  m.def("lsh_codes(Tensor z) -> (Tensor codes, Tensor scores)");
  m.def("lsh_codes_backward(Tensor dscores, Tensor z) -> Tensor");
  m.def(
      "sparse_ffn(Tensor x, Tensor up, Tensor down, Tensor indices, Tensor? weights, *, "
      "str activation) -> Tensor");
  m.def(
      "sparse_ffn_backward(Tensor dy, Tensor x, Tensor up, Tensor down, Tensor indices, "
      "Tensor? weights, *, str activation) "
      "-> (Tensor dx, Tensor dweights, Tensor up_factors, Tensor down_factors)");
}

}  // namespace memkernels::binding
