// What csrc/core/cuda/launch.h has for the CUDA runtime, for the host: the shared memory is an
// H200's, the multiprocessors are few, so that blocks share splits.
#pragma once

#include <cstring>

#include "core/context.h"
#include "machine.h"

namespace memkernels::cuda {

struct DeviceGuard {
  DeviceGuard(const char*, Device) {}
  ~DeviceGuard() {}
};

inline const void* pinned_data(const char*, const char*, const TensorView& t) { return t.data; }

struct Limits {
  int64_t of_block, of_multiprocessor;
  int multiprocessors;
};

inline Limits limits_of(const char*, Device) { return {227 << 10, 228 << 10, 2}; }

inline void copy_to_host(const char*, const Context&, void* to, const void* from, int64_t bytes) {
  std::memcpy(to, from, bytes);
}

inline void clear(const char*, const Context&, void* data, int64_t bytes) {
  std::memset(data, 0, bytes);
}

template <class... Parameters, class... Arguments>
void launch(const char* op, const Context&, void (*kernel)(Parameters...), int64_t blocks,
            int threads, int64_t shared_bytes, const Arguments&... arguments) {
  if (blocks == 0) return;
  simt::launch(op, {static_cast<unsigned>(blocks)}, {static_cast<unsigned>(threads)}, shared_bytes,
               [=] { kernel(arguments...); });
}

}  // namespace memkernels::cuda
