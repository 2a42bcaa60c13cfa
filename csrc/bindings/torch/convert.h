// Between torch's stable ABI and the core.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <vector>

#include "core/context.h"
#include "core/tensor.h"

// tests/simt registers the CUDA ops a second time, to run on the host.
#ifndef MEMKERNELS_NAMESPACE
#define MEMKERNELS_NAMESPACE memkernels
#endif

namespace memkernels::binding {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Raises Error for dtypes and layouts the core does not know, naming `arg`.
TensorView view(const char* op, const char* arg, const Tensor& t);
TensorView view(const char* op, const char* arg, const OptionalTensor& t);

// Contiguous; large ones on the CPU advised to huge pages. `zeroed`: filled with zeros.
Tensor empty(std::initializer_list<int64_t> shape, Dtype dtype, Device device, bool zeroed = false);
Tensor empty_like(const TensorView& t, bool zeroed = false);
// Zeros of which little may ever be written: on the CPU they take memory only then, without huge
// pages unless the op asks for them.
Tensor sparse_zeros(std::initializer_list<int64_t> shape, Dtype dtype, Device device);

// The gradient of an input, and a view of it, if that bit of `needs` is set; else empty.
Tensor gradient(const char* op, int64_t needs, int bit, const TensorView& like, TensorView& to);

// Where an op with tensors on `device` runs. Owns what the op allocates there.
class OpContext {
 public:
  OpContext(const char* op, Device device);
  OpContext(const OpContext&) = delete;
  OpContext& operator=(const OpContext&) = delete;
  operator const Context&() const { return ctx_; }

 private:
  Context ctx_;
  std::vector<Tensor> allocated_;
};

}  // namespace memkernels::binding
