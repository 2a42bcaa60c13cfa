#include "core/check.h"

namespace memkernels {

const char* name(Dtype dtype) {
  switch (dtype) {
    case Dtype::f64:
      return "float64";
    case Dtype::f32:
      return "float32";
    case Dtype::bf16:
      return "bfloat16";
    case Dtype::f16:
      return "float16";
    case Dtype::i64:
      return "int64";
    case Dtype::i32:
      return "int32";
    case Dtype::i8:
      return "int8";
    case Dtype::u8:
      return "uint8";
    case Dtype::e4m3:
      return "float8_e4m3fn";
  }
  return "?";
}

int64_t item_size(Dtype dtype) {
  switch (dtype) {
    case Dtype::f64:
    case Dtype::i64:
      return 8;
    case Dtype::f32:
    case Dtype::i32:
      return 4;
    case Dtype::bf16:
    case Dtype::f16:
      return 2;
    case Dtype::i8:
    case Dtype::u8:
    case Dtype::e4m3:
      return 1;
  }
  return 0;
}

int64_t numel(const TensorView& t) {
  int64_t n = 1;
  for (int i = 0; i < t.ndim; ++i) n *= t.shape[i];
  return n;
}

std::ostream& operator<<(std::ostream& out, Sizes sizes) {
  out << '[';
  for (int i = 0; i < sizes.count; ++i) {
    out << (i ? ", " : "");
    sizes.data[i] < 0 ? out << '*' : out << sizes.data[i];
  }
  return out << ']';
}

void check_shape(const char* op, const char* arg, const TensorView& t, const char* meaning,
                 std::initializer_list<int64_t> expected) {
  bool ok = t.ndim == static_cast<int>(expected.size());
  int i = 0;
  for (int64_t size : expected) {
    ok = ok && (size < 0 || t.shape[i] == size);
    ++i;
  }
  check(ok, op, arg, " must be ", meaning, " = ",
        Sizes{expected.begin(), static_cast<int>(expected.size())}, ", got ", shape_of(t));
}

void check_dtype(const char* op, const char* arg, const TensorView& t, Dtype expected) {
  check(t.dtype == expected, op, arg, " must be ", name(expected), ", got ", name(t.dtype));
}

void check_floating(const char* op, const char* arg, const TensorView& t) {
  check(is_floating(t.dtype), op, arg, " has an unsupported dtype ", name(t.dtype),
        "; supported: float32, bfloat16, float16, and float64 on the CPU");
}

void check_index(const char* op, const char* arg, const TensorView& t) {
  check(t.dtype == Dtype::i32 || t.dtype == Dtype::i64, op, arg, " must be int32 or int64, got ",
        name(t.dtype));
}

void check_companion(const char* op, const char* arg, const TensorView& t, Dtype main) {
  const Dtype wide = accumulator(main);
  check(t.dtype == main || t.dtype == wide, op, arg, " must be ", name(wide),
        wide == main ? "" : " or ", wide == main ? "" : name(main), ", got ", name(t.dtype));
}

void check_device(const char* op, const char* arg, const TensorView& t, Device expected) {
  check(t.device.type == expected.type && t.device.index == expected.index, op, arg,
        " is on another device than the other arguments");
}

void check_rows_contiguous(const char* op, const char* arg, const TensorView& t) {
  check(t.shape[t.ndim - 1] <= 1 || t.stride[t.ndim - 1] == 1 || numel(t) == 0, op, arg,
        " must be contiguous in its last dimension, got stride ", t.stride[t.ndim - 1]);
}

void check_contiguous(const char* op, const char* arg, const TensorView& t) {
  if (numel(t) == 0) return;
  int64_t expected = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    check(t.shape[i] == 1 || t.stride[i] == expected, op, arg, " must be contiguous");
    expected *= t.shape[i];
  }
}

namespace {

struct Span {
  const char *begin, *end;
  explicit Span(const TensorView& t) : begin(static_cast<const char*>(t.data)), end(begin) {
    if (!given(t) || numel(t) == 0) return;
    int64_t last = 0;
    for (int i = 0; i < t.ndim; ++i) last += (t.shape[i] - 1) * t.stride[i];
    end += (last + 1) * item_size(t.dtype);
  }
};

}  // namespace

void check_apart(const char* op, const char* arg, const TensorView& t, const char* other_arg,
                 const TensorView& other) {
  const Span a(t), b(other);
  check(a.begin == a.end || b.begin == b.end || a.end <= b.begin || b.end <= a.begin, op, arg,
        " overlaps ", other_arg);
}

}  // namespace memkernels
