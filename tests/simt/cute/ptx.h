// Runs the PTX that rewrite_asm.py found in headers: the instructions of CuTe's sm_80 atoms, and of
// sm_90 mbarriers, 2D tile loads by TMA and wgmma with both operands in shared memory. Any other is
// an error when it is reached.
#pragma once

#include <cuda.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#undef __launch_bounds__
#undef __forceinline__
#undef __global__
#undef __device__
#undef __host__
#undef __restrict__
#undef __grid_constant__
#define __grid_constant__

#include <math.h>

#include <type_traits>
#include <vector>

#include "../device.h"

namespace simt {

struct Operand {
  uint64_t value;
  void* place;  // of an output
};

template <class T>
inline Operand output(T& x) {
  return {0, const_cast<std::remove_const_t<T>*>(&x)};
}
template <class T>
inline Operand input(const T& x) {
  Operand operand{0, nullptr};
  if constexpr (std::is_array_v<T>) {
    operand.value = reinterpret_cast<uint64_t>(&x);
  } else if constexpr (std::is_integral_v<T> && std::is_signed_v<T>) {
    operand.value = static_cast<uint64_t>(static_cast<int64_t>(x));
  } else {
    std::memcpy(&operand.value, &x, sizeof x < 8 ? sizeof x : 8);
  }
  return operand;
}

class Instruction;
using Handler = void (*)(const Instruction&, const Operand*, Site);

class Instruction {
 public:
  explicit Instruction(const char* text);
  void run(const Operand* operands, const char* file, int line) const {
    handler_(*this, operands, {file, line});
  }

  const char* text() const { return text_; }
  // The k-th operand in the order of the text; some are inputs and outputs.
  template <class T>
  T get(const Operand* operands, int k) const {
    const Operand& operand = operands[order_[k]];
    T x;
    std::memcpy(&x, operand.place ? operand.place : &operand.value, sizeof x);
    return x;
  }
  template <class T>
  void set(const Operand* operands, int k, T x) const {
    std::memcpy(operands[order_[k]].place, &x, sizeof x);
  }

 private:
  const char* text_;
  Handler handler_;
  std::vector<int> order_;
};

// Addresses in shared memory, as PTX has them: offsets from its beginning.
uint32_t offset_of(const void* p);

// A tensor map of two dimensions: its id is all that the CUtensorMap holds.
struct TensorMap {
  const char* base;
  uint32_t item_size, swizzle;
  uint64_t size[2], row_stride;
  uint32_t box[2];
};
uint64_t add_tensor_map(const TensorMap& map);

}  // namespace simt

inline size_t __cvta_generic_to_shared(const void* p) { return simt::offset_of(p); }
template <class T>
inline T __ldg(const T* p) {
  return *p;
}
inline void __brkpt() { simt::fail("__brkpt"); }
inline void __trap() { simt::fail("__trap"); }
