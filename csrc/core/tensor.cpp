#include "core/tensor.h"

#include <algorithm>

#include "core/cpu/simd.h"

namespace memkernels {

double load_scalar(const void* data, Dtype dtype, int64_t offset) {
  switch (dtype) {
    case Dtype::f64:
      return static_cast<const double*>(data)[offset];
    case Dtype::f32:
      return static_cast<const float*>(data)[offset];
    case Dtype::bf16:
      return to_acc(static_cast<const bf16*>(data)[offset]);
    case Dtype::f16:
      return to_acc(static_cast<const f16*>(data)[offset]);
    default:
      return 0;
  }
}

void store_scalar(void* data, Dtype dtype, int64_t offset, double x) {
  const float narrow = static_cast<float>(x);
  switch (dtype) {
    case Dtype::f64:
      static_cast<double*>(data)[offset] = x;
      break;
    case Dtype::f32:
      static_cast<float*>(data)[offset] = narrow;
      break;
    case Dtype::bf16:
      static_cast<bf16*>(data)[offset] = from_acc<bf16>(narrow);
      break;
    case Dtype::f16:
      static_cast<f16*>(data)[offset] = from_acc<f16>(narrow);
      break;
    default:
      break;
  }
}

void fill_scalars(void* data, Dtype dtype, int64_t begin, int64_t end, double x) {
  if (dtype == Dtype::f64) {
    std::fill(static_cast<double*>(data) + begin, static_cast<double*>(data) + end, x);
  } else {
    std::fill(static_cast<float*>(data) + begin, static_cast<float*>(data) + end,
              static_cast<float>(x));
  }
}

}  // namespace memkernels
