// Types of device code.
#pragma once

#include <cstdint>

namespace memkernels::cuda {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// Integers on the device, of either width.
struct Integers {
  const void* data = nullptr;
  int64_t stride = 0;
  bool wide = false;  // int64, else int32
};

}  // namespace memkernels::cuda
