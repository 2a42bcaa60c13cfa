// Launching kernels from the op layer's arguments: devices, limits, errors.
#pragma once

#include "core/check.h"
#include "core/context.h"
#include "core/cuda/types.h"
#ifndef __CUDACC__
#include "launch_on_host.h"
#endif

namespace memkernels::cuda {

// Along one dimension; absent tensors have no data.
inline Integers integers(const TensorView& t, int dim = 0) {
  if (!given(t)) return {};
  return {t.data, t.stride[dim], t.dtype == Dtype::i64};
}

template <int kDims>
void copy_strides(const TensorView& t, int64_t (&strides)[kDims]) {
  for (int i = 0; given(t) && i < kDims; ++i) strides[i] = t.stride[i];
}

// Whether all that the first `dims` strides lead to begins at a multiple of so many bytes.
inline bool is_aligned(const TensorView& t, int dims, int64_t bytes) {
  if (!given(t)) return true;
  int64_t offsets = static_cast<int64_t>(reinterpret_cast<uintptr_t>(t.data));
  for (int i = 0; i < dims; ++i) offsets |= t.stride[i] * item_size(t.dtype);
  return offsets % bytes == 0;
}

inline void check_supported(const char* op, const char* arg, const TensorView& t) {
  check(t.dtype == Dtype::f32 || t.dtype == Dtype::bf16 || t.dtype == Dtype::f16, op, arg,
        " has an unsupported dtype ", name(t.dtype),
        "; supported on CUDA: float32, bfloat16, float16");
}

// Calls run with a value of a supported dtype.
template <class Run>
void with_type(Dtype dtype, const Run& run) {
  switch (dtype) {
    case Dtype::bf16:
      return run(bf16());
    case Dtype::f16:
      return run(f16());
    default:
      return run(float());
  }
}

// A size as kernels count.
inline int as_int(const char* op, const char* what, int64_t n) {
  check(n <= 0x7fffffff, op, what, " ", n, " exceed what a CUDA launch takes");
  return static_cast<int>(n);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#ifdef __CUDACC__

inline void check_cuda(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  const bool driver = error == cudaErrorInsufficientDriver || error == cudaErrorNoDevice;
  fail(op, "CUDA says: ", cudaGetErrorString(error),
       driver ? ". This build needs an NVIDIA GPU and driver 580 or newer (CUDA 13)" : "");
}

// Makes the tensors' device current; puts back what was.
class DeviceGuard {
 public:
  DeviceGuard(const char* op, Device device) {
    check_cuda(op, cudaGetDevice(&before_));
    if (before_ != device.index) check_cuda(op, cudaSetDevice(device.index));
    changed_ = before_ != device.index;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// What a tensor of the host, which must be pinned, is for the device.
inline const void* pinned_data(const char* op, const char* arg, const TensorView& t) {
  cudaPointerAttributes attributes{};
  check_cuda(op, cudaPointerGetAttributes(&attributes, t.data));
  const bool pinned = attributes.type != cudaMemoryTypeUnregistered && attributes.devicePointer;
  check(pinned, op, arg,
        " is in the host's memory, where the GPU reads only what is pinned (Tensor.pin_memory)");
  return attributes.devicePointer;
}

// Bytes of shared memory a block may have, and what all blocks of a multiprocessor share.
struct Limits {
  int64_t of_block, of_multiprocessor;
  int multiprocessors;
};

inline Limits limits_of(const char* op, Device device) {
  int block = 0, all = 0, count = 0;
  check_cuda(op,
             cudaDeviceGetAttribute(&block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device.index));
  check_cuda(
      op, cudaDeviceGetAttribute(&all, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device.index));
  check_cuda(op, cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device.index));
  return {block, all, count};
}

inline void copy_to_host(const char* op, const Context& ctx, void* to, const void* from,
                         int64_t bytes) {
  const auto stream = static_cast<cudaStream_t>(ctx.stream);
  check_cuda(op, cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream));
  check_cuda(op, cudaStreamSynchronize(stream));
}

inline void clear(const char* op, const Context& ctx, void* data, int64_t bytes) {
  check_cuda(op, cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(ctx.stream)));
}

template <class... Parameters, class... Arguments>
void launch(const char* op, const Context& ctx, void (*kernel)(Parameters...), int64_t blocks,
            int threads, int64_t shared_bytes, const Arguments&... arguments) {
  check(blocks <= 0x7fffffff, op, "too large for one launch: ", blocks, " blocks");
  if (blocks == 0) return;
  if (shared_bytes > 48 * 1024) {
    const int64_t most = limits_of(op, ctx.device).of_block;
    check(shared_bytes <= most, op, "these sizes take ", shared_bytes,
          " bytes of shared memory a block, and this GPU has ", most);
    // Always the most, so that threads of the host never take it from one another.
    check_cuda(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(most)));
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes,
           static_cast<cudaStream_t>(ctx.stream)>>>(arguments...);
  check_cuda(op, cudaGetLastError());
}

#endif

}  // namespace memkernels::cuda
