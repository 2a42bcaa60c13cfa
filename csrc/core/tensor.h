// Non-owning views of framework tensors: what every op and kernel sees instead of torch.
#pragma once

#include <cstdint>

namespace memkernels {

enum class Dtype : uint8_t { f64, f32, bf16, f16, i64, i32, i8, u8, e4m3 };
enum class DeviceType : uint8_t { cpu, cuda };

struct Device {
  DeviceType type = DeviceType::cpu;
  int index = 0;
};

inline constexpr int kMaxDims = 5;

// Plain data, so that files compiled for one instruction set emit no shared inline functions.
struct TensorView {
  void* data = nullptr;
  Dtype dtype = Dtype::f32;
  Device device;
  int ndim = -1;  // -1: an optional tensor that was not given
  int64_t shape[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};  // in elements
};

// One floating element at an offset, whatever its dtype.
double load_scalar(const void* data, Dtype dtype, int64_t offset);
void store_scalar(void* data, Dtype dtype, int64_t offset, double x);
// Elements [begin, end) of float32 or float64.
void fill_scalars(void* data, Dtype dtype, int64_t begin, int64_t end, double x);

}  // namespace memkernels
