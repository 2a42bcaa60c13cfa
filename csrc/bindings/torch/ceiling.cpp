// Torch ops behind benchmarks: the limits of this machine, measured in the same process and run.
#include "core/ceiling.h"

#include <string>

#include "bindings/torch/convert.h"
#include "core/check.h"
#include "core/memory.h"

namespace memkernels::binding {

namespace {

double read_ceiling(const Tensor& t) {
  constexpr char op[] = "_read_ceiling";
  return memkernels::read_ceiling(view(op, "tensor", t), OpContext(op, Device()));
}

double gather_ceiling(const Tensor& t, const Tensor& order) {
  constexpr char op[] = "_gather_ceiling";
  return memkernels::gather_ceiling(view(op, "tensor", t), view(op, "order", order),
                                    OpContext(op, Device()));
}

void update_ceiling(const Tensor& t) {
  constexpr char op[] = "_update_ceiling";
  memkernels::update_ceiling(view(op, "tensor", t), OpContext(op, Device()));
}

double fma_ceiling(const Tensor& like, int64_t rounds) {
  constexpr char op[] = "_fma_ceiling";
  const TensorView v = view(op, "like", like);
  check_floating(op, "like", v);
  return memkernels::flop_ceiling(v.dtype, rounds, OpContext(op, Device()));
}

void advise_huge_pages(const Tensor& t) {
  const TensorView v = view("_advise_huge_pages", "tensor", t);
  check_contiguous("_advise_huge_pages", "tensor", v);
  memkernels::advise_huge_pages(v.data, numel(v) * item_size(v.dtype));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(memkernels, m) {
  m.def("_read_ceiling(Tensor tensor) -> float");
  m.def("_gather_ceiling(Tensor tensor, Tensor order) -> float");
  m.def("_update_ceiling(Tensor(a!) tensor) -> ()");
  m.def("_fma_ceiling(Tensor like, int rounds) -> float");
  m.def("_advise_huge_pages(Tensor tensor) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(memkernels, CPU, m) {
  m.impl("_read_ceiling", TORCH_BOX(&read_ceiling));
  m.impl("_gather_ceiling", TORCH_BOX(&gather_ceiling));
  m.impl("_update_ceiling", TORCH_BOX(&update_ceiling));
  m.impl("_fma_ceiling", TORCH_BOX(&fma_ceiling));
  m.impl("_advise_huge_pages", TORCH_BOX(&advise_huge_pages));
}

}  // namespace memkernels::binding
