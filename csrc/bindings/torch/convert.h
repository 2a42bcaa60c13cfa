// Between torch's stable ABI and the core.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>

#include "core/context.h"
#include "core/tensor.h"

namespace memkernels::binding {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Raises Error for dtypes and layouts the core does not know, naming `arg`.
TensorView view(const char* op, const char* arg, const Tensor& t);
TensorView view(const char* op, const char* arg, const OptionalTensor& t);

// Contiguous, on the CPU; large ones advised to huge pages. `zeroed`: filled with zeros.
Tensor empty(std::initializer_list<int64_t> shape, Dtype dtype, bool zeroed = false);
Tensor empty_like(const TensorView& t, bool zeroed = false);

Context cpu_context();

}  // namespace memkernels::binding
