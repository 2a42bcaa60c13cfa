// The one exception of the library, the checks that raise it, and reading indices.
#pragma once

#include <sstream>
#include <stdexcept>

#include "core/tensor.h"

namespace memkernels {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream text;
  text << op << ": ";
  (text << ... << parts);
  throw Error(text.str());
}

// The parts are written out only on failure, so they must cost nothing to pass.
template <class... Parts>
inline void check(bool ok, const char* op, const Parts&... parts) {
  if (!ok) fail(op, parts...);
}

const char* name(Dtype dtype);

// Prints as [2, 16, 8], with * for sizes below zero.
struct Sizes {
  const int64_t* data;
  int count;
};
std::ostream& operator<<(std::ostream& out, Sizes sizes);
inline Sizes shape_of(const TensorView& t) { return {t.shape, t.ndim}; }

int64_t numel(const TensorView& t);
int64_t item_size(Dtype dtype);

inline bool given(const TensorView& t) { return t.ndim >= 0; }
// The dtype in which sums over that one are kept.
inline Dtype accumulator(Dtype d) { return d == Dtype::f64 ? Dtype::f64 : Dtype::f32; }
// What is computed in; 8-bit numbers are only stored.
inline bool is_floating(Dtype d) { return d <= Dtype::f16; }

// Each refuses `t` in one sentence that names the argument, what was expected and what came.
void check_shape(const char* op, const char* arg, const TensorView& t, const char* meaning,
                 std::initializer_list<int64_t> expected);  // -1 in `expected`: any size
void check_dtype(const char* op, const char* arg, const TensorView& t, Dtype expected);
void check_floating(const char* op, const char* arg, const TensorView& t);
void check_index(const char* op, const char* arg, const TensorView& t);
// float32 (float64 beside float64 tensors), or the dtype of the tensors it goes with.
void check_companion(const char* op, const char* arg, const TensorView& t, Dtype main);
void check_device(const char* op, const char* arg, const TensorView& t, Device expected);
void check_rows_contiguous(const char* op, const char* arg, const TensorView& t);
void check_contiguous(const char* op, const char* arg, const TensorView& t);
// That `arg`, which is written, has no memory in common with another argument.
void check_apart(const char* op, const char* arg, const TensorView& t, const char* other_arg,
                 const TensorView& other);

// An element of an integer tensor at an offset (in elements, strides applied).
inline int64_t index_at(const TensorView& t, int64_t offset) {
  return t.dtype == Dtype::i64 ? static_cast<const int64_t*>(t.data)[offset]
                               : static_cast<const int32_t*>(t.data)[offset];
}

}  // namespace memkernels
