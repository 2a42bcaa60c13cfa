// Torch ops of the scan family: schemas and adapters.
#include <string>
#include <tuple>

#include "bindings/torch/convert.h"
#include "core/check.h"
#include "scan/sequences.h"
#include "scan/state_step.h"

namespace memkernels::binding {

namespace {

Tensor state_step(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                  const Tensor& state, const OptionalTensor& g, const OptionalTensor& state_indices,
                  scan::StateStepArgs a) {
  a.q = view(op, "q", q);
  a.k = view(op, "k", k);
  a.v = view(op, "v", v);
  a.g = view(op, "g", g);
  a.state = view(op, "state", state);
  a.state_indices = view(op, "state_indices", state_indices);
  Tensor out = empty_like(a.v);
  a.out = view(op, "out", out);
  scan::state_step(op, a, OpContext(op, a.q.device));
  return out;
}

Tensor linear_attention_step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& state,
                             const OptionalTensor& z, const OptionalTensor& g,
                             const OptionalTensor& state_indices, double scale, double eps) {
  constexpr char op[] = "linear_attention_step";
  scan::StateStepArgs a;
  a.z = view(op, "z", z);
  a.scale = scale;
  a.eps = eps;
  return state_step(op, q, k, v, state, g, state_indices, a);
}

Tensor delta_rule_step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& beta,
                       const Tensor& state, const OptionalTensor& g,
                       const OptionalTensor& state_indices, double scale, bool qk_l2norm) {
  constexpr char op[] = "delta_rule_step";
  scan::StateStepArgs a;
  a.beta = view(op, "beta", beta);
  a.scale = scale;
  a.qk_l2norm = qk_l2norm;
  return state_step(op, q, k, v, state, g, state_indices, a);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(MEMKERNELS_NAMESPACE, m) {
  m.def(
      "linear_attention(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? initial_state, "
      "Tensor? initial_z, Tensor? cu_seqlens, *, float scale, bool normalize, float eps, "
      "bool output_final_state) -> (Tensor out, Tensor state, Tensor z)");
  m.def(
      "linear_attention_backward(Tensor dout, Tensor? dstate, Tensor? dz, Tensor q, Tensor k, "
      "Tensor v, Tensor? g, Tensor? initial_state, Tensor? initial_z, Tensor? cu_seqlens, "
      "Tensor? out, *, int needs, float scale, bool normalize, float eps) "
      "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dg, Tensor dinitial_state, Tensor dinitial_z)");
  m.def(
      "delta_rule(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, Tensor? initial_state, "
      "Tensor? cu_seqlens, *, float scale, bool qk_l2norm, bool output_final_state) "
      "-> (Tensor out, Tensor state)");
  m.def(
      "delta_rule_backward(Tensor dout, Tensor? dstate, Tensor q, Tensor k, Tensor v, Tensor beta, "
      "Tensor? g, Tensor? initial_state, Tensor? cu_seqlens, *, int needs, float scale, "
      "bool qk_l2norm) "
      "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dbeta, Tensor dg, Tensor dinitial_state)");
  m.def(
      "selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
      "Tensor? delta_bias, Tensor? initial_state, Tensor? cu_seqlens, *, bool delta_softplus, "
      "bool output_final_state) -> (Tensor out, Tensor state)");
  m.def(
      "selective_scan_backward(Tensor dout, Tensor? dstate, Tensor u, Tensor delta, Tensor A, "
      "Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, Tensor? initial_state, "
      "Tensor? cu_seqlens, *, int needs, bool delta_softplus) "
      "-> (Tensor du, Tensor ddelta, Tensor dA, Tensor dB, Tensor dC, Tensor dD, Tensor dz, "
      "Tensor ddelta_bias, Tensor dinitial_state)");
  m.def(
      "diagonal_scan(Tensor x, Tensor a, Tensor? initial_state, Tensor? reset, "
      "Tensor? cu_seqlens, *, bool output_final_state) -> (Tensor h, Tensor state)");
  m.def(
      "diagonal_scan_backward(Tensor dh, Tensor? dstate, Tensor a, Tensor h, "
      "Tensor? initial_state, Tensor? reset, Tensor? cu_seqlens, *, int needs) "
      "-> (Tensor dx, Tensor da, Tensor dinitial_state)");
  m.def(
      "causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, "
      "Tensor? cu_seqlens, *, int dilation, str activation, bool output_final_state) "
      "-> (Tensor out, Tensor state)");
  m.def(
      "causal_conv1d_backward(Tensor dout, Tensor? dstate, Tensor x, Tensor weight, Tensor? bias, "
      "Tensor? initial_state, Tensor? cu_seqlens, *, int needs, int dilation, str activation) "
      "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial_state)");
  m.def("feature_map(Tensor x, *, str kind, int nu) -> Tensor");
  m.def("feature_map_backward(Tensor dout, Tensor x, *, str kind, int nu) -> Tensor");
  m.def(
      "route_indices(Tensor expert_ids, *, int num_memories) "
      "-> (Tensor order, Tensor cu_seqlens, Tensor inverse)");
  m.def(
      "linear_attention_step(Tensor q, Tensor k, Tensor v, Tensor(a!) state, Tensor(b!)? z, "
      "Tensor? g, Tensor? state_indices, *, float scale, float eps) -> Tensor");
  m.def(
      "delta_rule_step(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor(a!) state, Tensor? g, "
      "Tensor? state_indices, *, float scale, bool qk_l2norm) -> Tensor");
  m.def(
      "selective_scan_step(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, "
      "Tensor(a!) state, Tensor? D, Tensor? z, Tensor? delta_bias, Tensor? state_indices, *, "
      "bool delta_softplus) -> Tensor");
  m.def(
      "causal_conv1d_step(Tensor x, Tensor weight, Tensor(a!) state, Tensor? bias, "
      "Tensor? state_indices, *, int dilation, str activation) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(MEMKERNELS_NAMESPACE, CPU, m) {
  m.impl("linear_attention_step", TORCH_BOX(&linear_attention_step));
  m.impl("delta_rule_step", TORCH_BOX(&delta_rule_step));
}

}  // namespace memkernels::binding
