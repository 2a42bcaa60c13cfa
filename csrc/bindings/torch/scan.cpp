// Torch ops of the scan family: schemas and adapters.
#include <string>
#include <tuple>

#include "bindings/torch/convert.h"
#include "core/check.h"
#include "scan/causal_conv1d.h"
#include "scan/chunk_scan.h"
#include "scan/diagonal_scan.h"
#include "scan/feature_map.h"
#include "scan/route_indices.h"
#include "scan/selective_scan.h"
#include "scan/sequences.h"
#include "scan/state_step.h"

namespace memkernels::binding {

namespace {

// ---- chunk scans ----

int64_t num_sequences(const TensorView& cu_seqlens, const TensorView& like) {
  return given(cu_seqlens) ? cu_seqlens.shape[0] - 1 : like.shape[0];
}

scan::ChunkScanArgs chunk_args(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                               const OptionalTensor& g, const OptionalTensor& initial_state,
                               const OptionalTensor& cu_seqlens, double scale) {
  scan::ChunkScanArgs a;
  a.q = view(op, "q", q);
  a.k = view(op, "k", k);
  a.v = view(op, "v", v);
  a.g = view(op, "g", g);
  a.initial_state = view(op, "initial_state", initial_state);
  a.cu_seqlens = view(op, "cu_seqlens", cu_seqlens);
  a.scale = scale;
  check_floating(op, "v", a.v);
  check_shape(op, "k", a.k, "[B, T, H, K]", {-1, -1, -1, -1});
  check_shape(op, "v", a.v, "[B, T, HV, V]", {-1, -1, -1, -1});
  check(!given(a.cu_seqlens) || (a.cu_seqlens.ndim == 1 && a.cu_seqlens.shape[0] > 0), op,
        "cu_seqlens must be [N + 1], got ", shape_of(a.cu_seqlens));
  return a;
}

Tensor final_state(const char* op, const scan::ChunkScanArgs& a, bool wanted, TensorView& to) {
  const Dtype dtype = accumulator(a.v.dtype);
  if (!wanted) return empty({0}, dtype, a.v.device);
  Tensor t = empty({num_sequences(a.cu_seqlens, a.v), a.v.shape[2], a.k.shape[3], a.v.shape[3]},
                   dtype, a.v.device);
  to = view(op, "state", t);
  return t;
}

std::tuple<Tensor, Tensor, Tensor> linear_attention(const Tensor& q, const Tensor& k,
                                                    const Tensor& v, const OptionalTensor& g,
                                                    const OptionalTensor& initial_state,
                                                    const OptionalTensor& initial_z,
                                                    const OptionalTensor& cu_seqlens, double scale,
                                                    bool normalize, double eps,
                                                    bool output_final_state) {
  constexpr char op[] = "linear_attention";
  scan::ChunkScanArgs a = chunk_args(op, q, k, v, g, initial_state, cu_seqlens, scale);
  a.initial_z = view(op, "initial_z", initial_z);
  a.normalize = normalize;
  a.eps = eps;
  Tensor out = empty_like(a.v);
  a.out = view(op, "out", out);
  Tensor state = final_state(op, a, output_final_state, a.state);
  Tensor z = empty({0}, accumulator(a.v.dtype), a.v.device);
  if (output_final_state && normalize) {
    z = empty({num_sequences(a.cu_seqlens, a.v), a.v.shape[2], a.k.shape[3]},
              accumulator(a.v.dtype), a.v.device);
    a.z = view(op, "z", z);
  }
  scan::chunk_scan(op, a, OpContext(op, a.q.device));
  return {out, state, z};
}

std::tuple<Tensor, Tensor> delta_rule(const Tensor& q, const Tensor& k, const Tensor& v,
                                      const Tensor& beta, const OptionalTensor& g,
                                      const OptionalTensor& initial_state,
                                      const OptionalTensor& cu_seqlens, double scale,
                                      bool qk_l2norm, bool output_final_state) {
  constexpr char op[] = "delta_rule";
  scan::ChunkScanArgs a = chunk_args(op, q, k, v, g, initial_state, cu_seqlens, scale);
  a.beta = view(op, "beta", beta);
  a.qk_l2norm = qk_l2norm;
  Tensor out = empty_like(a.v);
  a.out = view(op, "out", out);
  Tensor state = final_state(op, a, output_final_state, a.state);
  scan::chunk_scan(op, a, OpContext(op, a.q.device));
  return {out, state};
}

// Of q and k: those of each value head, in accumulators, if several share them.
Tensor head_gradient(const char* op, int64_t needs, int bit, const TensorView& like,
                     const TensorView& v, TensorView& to) {
  TensorView shape = like;
  if (v.shape[2] != like.shape[2]) {
    shape.shape[2] = v.shape[2];
    shape.dtype = accumulator(like.dtype);
  }
  return gradient(op, needs, bit, shape, to);
}

Tensor gate_gradient(const char* op, int64_t needs, int bit, const TensorView& gate,
                     const TensorView& v, TensorView& to) {
  TensorView shape = gate.ndim == 4 ? gate : v;
  if (gate.ndim != 4) shape.ndim = 3;
  shape.dtype = accumulator(v.dtype);
  return gradient(op, needs, bit, shape, to);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_attention_backward(
    const Tensor& dout, const OptionalTensor& dstate, const OptionalTensor& dz, const Tensor& q,
    const Tensor& k, const Tensor& v, const OptionalTensor& g, const OptionalTensor& initial_state,
    const OptionalTensor& initial_z, const OptionalTensor& cu_seqlens, int64_t needs, double scale,
    bool normalize, double eps) {
  constexpr char op[] = "linear_attention_backward";
  scan::ChunkScanArgs a = chunk_args(op, q, k, v, g, initial_state, cu_seqlens, scale);
  a.initial_z = view(op, "initial_z", initial_z);
  a.normalize = normalize;
  a.eps = eps;
  scan::ChunkScanGrads grads;
  grads.dout = view(op, "dout", dout);
  grads.dstate = view(op, "dstate", dstate);
  grads.dz = view(op, "dz", dz);
  Tensor dq = head_gradient(op, needs, 0, a.q, a.v, grads.dq),
         dk = head_gradient(op, needs, 1, a.k, a.v, grads.dk);
  Tensor dv = gradient(op, needs, 2, a.v, grads.dv);
  Tensor dg = gate_gradient(op, needs, 3, a.g, a.v, grads.dg);
  Tensor dinitial_state = gradient(op, needs, 4, a.initial_state, grads.dinitial_state),
         dinitial_z = gradient(op, needs, 5, a.initial_z, grads.dinitial_z);
  scan::chunk_scan_backward(op, a, grads, OpContext(op, a.q.device));
  return {dq, dk, dv, dg, dinitial_state, dinitial_z};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> delta_rule_backward(
    const Tensor& dout, const OptionalTensor& dstate, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& beta, const OptionalTensor& g,
    const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens, int64_t needs,
    double scale, bool qk_l2norm) {
  constexpr char op[] = "delta_rule_backward";
  scan::ChunkScanArgs a = chunk_args(op, q, k, v, g, initial_state, cu_seqlens, scale);
  a.beta = view(op, "beta", beta);
  a.qk_l2norm = qk_l2norm;
  scan::ChunkScanGrads grads;
  grads.dout = view(op, "dout", dout);
  grads.dstate = view(op, "dstate", dstate);
  Tensor dq = head_gradient(op, needs, 0, a.q, a.v, grads.dq),
         dk = head_gradient(op, needs, 1, a.k, a.v, grads.dk);
  Tensor dv = gradient(op, needs, 2, a.v, grads.dv);
  Tensor dbeta = gate_gradient(op, needs, 3, a.beta, a.v, grads.dbeta),
         dg = gate_gradient(op, needs, 4, a.g, a.v, grads.dg);
  Tensor dinitial_state = gradient(op, needs, 5, a.initial_state, grads.dinitial_state);
  scan::chunk_scan_backward(op, a, grads, OpContext(op, a.q.device));
  return {dq, dk, dv, dbeta, dg, dinitial_state};
}

// ---- selective scan ----

scan::SelectiveScanArgs selective_args(const char* op, const Tensor& u, const Tensor& delta,
                                       const Tensor& A, const Tensor& B, const Tensor& C,
                                       const OptionalTensor& D, const OptionalTensor& z,
                                       const OptionalTensor& delta_bias,
                                       const OptionalTensor& initial_state,
                                       const OptionalTensor& cu_seqlens, bool delta_softplus) {
  scan::SelectiveScanArgs a;
  a.u = view(op, "u", u);
  a.delta = view(op, "delta", delta);
  a.A = view(op, "A", A);
  a.B = view(op, "B", B);
  a.C = view(op, "C", C);
  a.D = view(op, "D", D);
  a.z = view(op, "z", z);
  a.delta_bias = view(op, "delta_bias", delta_bias);
  a.initial_state = view(op, "initial_state", initial_state);
  a.delta_softplus = delta_softplus;
  check_shape(op, "u", a.u, "[B, T, D]", {-1, -1, -1});
  check_shape(op, "A", a.A, "[D, S]", {a.u.shape[2], -1});
  a.sequences = scan::make_sequences(op, view(op, "cu_seqlens", cu_seqlens), a.u.shape[0],
                                     a.u.shape[1], a.u.device);
  return a;
}

std::tuple<Tensor, Tensor> selective_scan(const Tensor& u, const Tensor& delta, const Tensor& A,
                                          const Tensor& B, const Tensor& C, const OptionalTensor& D,
                                          const OptionalTensor& z, const OptionalTensor& delta_bias,
                                          const OptionalTensor& initial_state,
                                          const OptionalTensor& cu_seqlens, bool delta_softplus,
                                          bool output_final_state) {
  constexpr char op[] = "selective_scan";
  scan::SelectiveScanArgs a = selective_args(op, u, delta, A, B, C, D, z, delta_bias, initial_state,
                                             cu_seqlens, delta_softplus);
  Tensor out = empty_like(a.u);
  a.out = view(op, "out", out);
  Tensor state = output_final_state
                     ? empty({a.sequences.count, a.A.shape[0], a.A.shape[1]}, a.A.dtype, a.u.device)
                     : empty({0}, a.A.dtype, a.u.device);
  if (output_final_state) a.state = view(op, "state", state);
  scan::selective_scan(a, OpContext(op, a.u.device));
  return {out, state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
selective_scan_backward(const Tensor& dout, const OptionalTensor& dstate, const Tensor& u,
                        const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                        const OptionalTensor& D, const OptionalTensor& z,
                        const OptionalTensor& delta_bias, const OptionalTensor& initial_state,
                        const OptionalTensor& cu_seqlens, int64_t needs, bool delta_softplus) {
  constexpr char op[] = "selective_scan_backward";
  const scan::SelectiveScanArgs a = selective_args(op, u, delta, A, B, C, D, z, delta_bias,
                                                   initial_state, cu_seqlens, delta_softplus);
  scan::SelectiveScanGrads g;
  g.dout = view(op, "dout", dout);
  g.dstate = view(op, "dstate", dstate);
  Tensor du = gradient(op, needs, 0, a.u, g.du), ddelta = gradient(op, needs, 1, a.delta, g.ddelta);
  Tensor dA = gradient(op, needs, 2, a.A, g.dA);
  Tensor dB = gradient(op, needs, 3, a.B, g.dB), dC = gradient(op, needs, 4, a.C, g.dC);
  Tensor dD = gradient(op, needs, 5, a.D, g.dD), dz = gradient(op, needs, 6, a.z, g.dz);
  Tensor dbias = gradient(op, needs, 7, a.delta_bias, g.ddelta_bias);
  Tensor dinitial = gradient(op, needs, 8, a.initial_state, g.dinitial_state);
  scan::selective_scan_backward(a, g, OpContext(op, a.u.device));
  return {du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial};
}

Tensor selective_scan_step(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                           const Tensor& C, const Tensor& state, const OptionalTensor& D,
                           const OptionalTensor& z, const OptionalTensor& delta_bias,
                           const OptionalTensor& state_indices, bool delta_softplus) {
  constexpr char op[] = "selective_scan_step";
  scan::SelectiveScanStepArgs a;
  a.u = view(op, "u", u);
  a.delta = view(op, "delta", delta);
  a.A = view(op, "A", A);
  a.B = view(op, "B", B);
  a.C = view(op, "C", C);
  a.state = view(op, "state", state);
  a.D = view(op, "D", D);
  a.z = view(op, "z", z);
  a.delta_bias = view(op, "delta_bias", delta_bias);
  a.state_indices = view(op, "state_indices", state_indices);
  a.delta_softplus = delta_softplus;
  Tensor out = empty_like(a.u);
  a.out = view(op, "out", out);
  scan::selective_scan_step(a, OpContext(op, a.u.device));
  return out;
}

// ---- diagonal scan ----

// The sequences of x or h, and the sizes [N, D] or [N, D, 2] of its states.
struct DiagonalSizes {
  scan::Sequences sequences;
  TensorView state;

  DiagonalSizes(const char* op, const char* arg, const TensorView& like,
                const OptionalTensor& cu_seqlens) {
    check(like.ndim == 3 || (like.ndim == 4 && like.shape[3] == 2), op, arg,
          " must be [B, T, D] or [B, T, D, 2], got ", shape_of(like));
    sequences = scan::make_sequences(op, view(op, "cu_seqlens", cu_seqlens), like.shape[0],
                                     like.shape[1], like.device);
    state = like;
    state.dtype = accumulator(like.dtype);
    state.ndim = like.ndim - 1;
    state.shape[0] = sequences.count;
    state.shape[1] = like.shape[2];
    state.shape[2] = 2;
  }
};

std::tuple<Tensor, Tensor> diagonal_scan(const Tensor& x, const Tensor& a,
                                         const OptionalTensor& initial_state,
                                         const OptionalTensor& reset,
                                         const OptionalTensor& cu_seqlens,
                                         bool output_final_state) {
  constexpr char op[] = "diagonal_scan";
  scan::DiagonalScanArgs s;
  s.x = view(op, "x", x);
  s.a = view(op, "a", a);
  s.initial_state = view(op, "initial_state", initial_state);
  s.reset = view(op, "reset", reset);
  DiagonalSizes sizes(op, "x", s.x, cu_seqlens);
  s.sequences = sizes.sequences;
  Tensor h = empty_like(s.x);
  s.h = view(op, "h", h);
  Tensor state = output_final_state ? empty_like(sizes.state)
                 : s.x.ndim == 4    ? empty({0, 2}, sizes.state.dtype, s.x.device)
                                    : empty({0}, sizes.state.dtype, s.x.device);
  if (output_final_state) s.state = view(op, "state", state);
  scan::diagonal_scan(s, OpContext(op, s.x.device));
  return {h, state};
}

std::tuple<Tensor, Tensor, Tensor> diagonal_scan_backward(
    const Tensor& dh, const OptionalTensor& dstate, const Tensor& a, const Tensor& h,
    const OptionalTensor& initial_state, const OptionalTensor& reset,
    const OptionalTensor& cu_seqlens, int64_t needs) {
  constexpr char op[] = "diagonal_scan_backward";
  scan::DiagonalScanArgs s;
  s.a = view(op, "a", a);
  s.h = view(op, "h", h);
  s.initial_state = view(op, "initial_state", initial_state);
  s.reset = view(op, "reset", reset);
  const DiagonalSizes sizes(op, "h", s.h, cu_seqlens);
  s.sequences = sizes.sequences;
  scan::DiagonalScanGrads g;
  g.dh = view(op, "dh", dh);
  g.dstate = view(op, "dstate", dstate);
  Tensor dx = gradient(op, needs, 0, s.h, g.dx);
  Tensor da = gradient(op, needs, 1, s.a.ndim == s.h.ndim ? s.a : sizes.state, g.da);
  Tensor dinitial = gradient(op, needs, 2, sizes.state, g.dinitial_state);
  scan::diagonal_scan_backward(s, g, OpContext(op, s.h.device));
  return {dx, da, dinitial};
}

// ---- causal convolution ----

scan::ConvActivation conv_activation(const char* op, const std::string& activation) {
  check(activation == "silu" || activation == "none", op, "activation must be silu or none, got ",
        activation);
  return activation == "silu" ? scan::ConvActivation::silu : scan::ConvActivation::none;
}

scan::CausalConvArgs conv_args(const char* op, const Tensor& x, const Tensor& weight,
                               const OptionalTensor& bias, const OptionalTensor& initial_state,
                               const OptionalTensor& cu_seqlens, int64_t dilation,
                               const std::string& activation) {
  scan::CausalConvArgs a;
  a.x = view(op, "x", x);
  a.weight = view(op, "weight", weight);
  a.bias = view(op, "bias", bias);
  a.initial_state = view(op, "initial_state", initial_state);
  a.cu_seqlens = view(op, "cu_seqlens", cu_seqlens);
  a.dilation = dilation;
  a.activation = conv_activation(op, activation);
  check_floating(op, "x", a.x);
  check_shape(op, "x", a.x, "[B, T, D]", {-1, -1, -1});
  return a;
}

std::tuple<Tensor, Tensor> causal_conv1d(const Tensor& x, const Tensor& weight,
                                         const OptionalTensor& bias,
                                         const OptionalTensor& initial_state,
                                         const OptionalTensor& cu_seqlens, int64_t dilation,
                                         std::string activation, bool output_final_state) {
  constexpr char op[] = "causal_conv1d";
  scan::CausalConvArgs a =
      conv_args(op, x, weight, bias, initial_state, cu_seqlens, dilation, activation);
  Tensor out = empty_like(a.x);
  a.out = view(op, "out", out);
  Tensor state = empty({0}, a.x.dtype, a.x.device);
  if (output_final_state) {
    check(!given(a.cu_seqlens) || (a.cu_seqlens.ndim == 1 && a.cu_seqlens.shape[0] > 0), op,
          "cu_seqlens must be [N + 1], got ", shape_of(a.cu_seqlens));
    state = empty({num_sequences(a.cu_seqlens, a.x), a.x.shape[2],
                   scan::conv_state_length(op, a.weight, dilation)},
                  a.x.dtype, a.x.device);
    a.state = view(op, "state", state);
  }
  scan::causal_conv1d(a, OpContext(op, a.x.device));
  return {out, state};
}

// Of a weight or bias, in accumulators.
Tensor wide_gradient(const char* op, int64_t needs, int bit, TensorView like, TensorView& to) {
  like.dtype = accumulator(like.dtype);
  return gradient(op, needs, bit, like, to);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv1d_backward(
    const Tensor& dout, const OptionalTensor& dstate, const Tensor& x, const Tensor& weight,
    const OptionalTensor& bias, const OptionalTensor& initial_state,
    const OptionalTensor& cu_seqlens, int64_t needs, int64_t dilation, std::string activation) {
  constexpr char op[] = "causal_conv1d_backward";
  const scan::CausalConvArgs a =
      conv_args(op, x, weight, bias, initial_state, cu_seqlens, dilation, activation);
  scan::CausalConvGrads g;
  g.dout = view(op, "dout", dout);
  g.dstate = view(op, "dstate", dstate);
  Tensor dx = gradient(op, needs, 0, a.x, g.dx),
         dweight = wide_gradient(op, needs, 1, a.weight, g.dweight);
  Tensor dbias = wide_gradient(op, needs, 2, a.bias, g.dbias),
         dinitial_state = gradient(op, needs, 3, a.initial_state, g.dinitial_state);
  scan::causal_conv1d_backward(a, g, OpContext(op, a.x.device));
  return {dx, dweight, dbias, dinitial_state};
}

// ---- features and routes ----

scan::FeatureMapArgs feature_args(const char* op, const Tensor& x, const std::string& kind,
                                  int64_t nu) {
  using scan::FeatureKind;
  scan::FeatureMapArgs a;
  a.x = view(op, "x", x);
  a.nu = nu;
  static const struct {
    const char* name;
    FeatureKind kind;
  } kKinds[] = {{"elu1", FeatureKind::elu1},
                {"relu2", FeatureKind::relu2},
                {"taylor2", FeatureKind::taylor2},
                {"dpfp", FeatureKind::dpfp}};
  bool known = false;
  for (const auto& candidate : kKinds) {
    if (kind != candidate.name) continue;
    a.kind = candidate.kind;
    known = true;
  }
  check(known, op, "kind must be elu1, relu2, taylor2 or dpfp, got ", kind);
  check_floating(op, "x", a.x);
  check(a.x.ndim >= 1, op, "x must be [..., D], got a number");
  return a;
}

Tensor feature_map(const Tensor& x, std::string kind, int64_t nu) {
  constexpr char op[] = "feature_map";
  scan::FeatureMapArgs a = feature_args(op, x, kind, nu);
  TensorView like = a.x;
  int64_t& width = like.shape[like.ndim - 1];
  width = scan::num_features(op, a.kind, width, nu);
  Tensor out = empty_like(like);
  a.out = view(op, "out", out);
  scan::feature_map(a, OpContext(op, a.x.device));
  return out;
}

Tensor feature_map_backward(const Tensor& dout, const Tensor& x, std::string kind, int64_t nu) {
  constexpr char op[] = "feature_map_backward";
  const scan::FeatureMapArgs a = feature_args(op, x, kind, nu);
  scan::FeatureMapGrads g;
  g.dout = view(op, "dout", dout);
  Tensor dx = empty_like(a.x);
  g.dx = view(op, "dx", dx);
  scan::feature_map_backward(a, g, OpContext(op, a.x.device));
  return dx;
}

std::tuple<Tensor, Tensor, Tensor> route_indices(const Tensor& expert_ids, int64_t num_memories) {
  constexpr char op[] = "route_tokens";
  scan::RouteArgs a;
  a.expert_ids = view(op, "expert_ids", expert_ids);
  a.num_memories = num_memories;
  check(num_memories >= 0, op, "num_memories must not be negative, got ", num_memories);
  const Device device = a.expert_ids.device;
  TensorView like = a.expert_ids;
  like.dtype = Dtype::i64;
  Tensor order = empty({numel(like)}, Dtype::i64, device);
  Tensor cu_seqlens = empty({num_memories + 2}, Dtype::i32, device);
  Tensor inverse = empty_like(like);
  a.order = view(op, "order", order);
  a.cu_seqlens = view(op, "cu_seqlens", cu_seqlens);
  a.inverse = view(op, "inverse", inverse);
  scan::route_indices(op, a, OpContext(op, device));
  return {order, cu_seqlens, inverse};
}

// ---- one token a sequence ----

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

Tensor causal_conv1d_step(const Tensor& x, const Tensor& weight, const Tensor& state,
                          const OptionalTensor& bias, const OptionalTensor& state_indices,
                          int64_t dilation, std::string activation) {
  constexpr char op[] = "causal_conv1d_step";
  scan::CausalConvStepArgs a;
  a.x = view(op, "x", x);
  a.weight = view(op, "weight", weight);
  a.bias = view(op, "bias", bias);
  a.state = view(op, "state", state);
  a.state_indices = view(op, "state_indices", state_indices);
  a.dilation = dilation;
  a.activation = conv_activation(op, activation);
  check_floating(op, "x", a.x);
  Tensor out = empty_like(a.x);
  a.out = view(op, "out", out);
  scan::causal_conv1d_step(a, OpContext(op, a.x.device));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(MEMKERNELS_NAMESPACE, m) {
  m.def(
      "linear_attention(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? initial_state, "
      "Tensor? initial_z, Tensor? cu_seqlens, *, float scale, bool normalize, float eps, "
      "bool output_final_state) -> (Tensor out, Tensor state, Tensor z)");
  m.def(
      "linear_attention_backward(Tensor dout, Tensor? dstate, Tensor? dz, Tensor q, Tensor k, "
      "Tensor v, Tensor? g, Tensor? initial_state, Tensor? initial_z, Tensor? cu_seqlens, *, "
      "int needs, float scale, bool normalize, float eps) "
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

template <class Library>
static void implement(Library& m) {
  m.impl("linear_attention", TORCH_BOX(&linear_attention));
  m.impl("linear_attention_backward", TORCH_BOX(&linear_attention_backward));
  m.impl("delta_rule", TORCH_BOX(&delta_rule));
  m.impl("delta_rule_backward", TORCH_BOX(&delta_rule_backward));
  m.impl("selective_scan", TORCH_BOX(&selective_scan));
  m.impl("selective_scan_backward", TORCH_BOX(&selective_scan_backward));
  m.impl("selective_scan_step", TORCH_BOX(&selective_scan_step));
  m.impl("diagonal_scan", TORCH_BOX(&diagonal_scan));
  m.impl("diagonal_scan_backward", TORCH_BOX(&diagonal_scan_backward));
  m.impl("causal_conv1d", TORCH_BOX(&causal_conv1d));
  m.impl("causal_conv1d_backward", TORCH_BOX(&causal_conv1d_backward));
  m.impl("feature_map", TORCH_BOX(&feature_map));
  m.impl("feature_map_backward", TORCH_BOX(&feature_map_backward));
  m.impl("route_indices", TORCH_BOX(&route_indices));
  m.impl("causal_conv1d_step", TORCH_BOX(&causal_conv1d_step));
  m.impl("linear_attention_step", TORCH_BOX(&linear_attention_step));
  m.impl("delta_rule_step", TORCH_BOX(&delta_rule_step));
}

STABLE_TORCH_LIBRARY_IMPL(MEMKERNELS_NAMESPACE, CPU, m) { implement(m); }

#if defined(MEMKERNELS_WITH_CUDA) && !defined(MEMKERNELS_SIMT)
STABLE_TORCH_LIBRARY_IMPL(MEMKERNELS_NAMESPACE, CUDA, m) { implement(m); }
#endif

}  // namespace memkernels::binding
