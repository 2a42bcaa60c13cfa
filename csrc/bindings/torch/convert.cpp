#include "bindings/torch/convert.h"

#include <torch/csrc/stable/ops.h>

#include <dlfcn.h>

#include <cstdlib>

#include "core/check.h"
#include "core/memory.h"

namespace memkernels::binding {

namespace {

#ifdef MEMKERNELS_SIMT
constexpr bool kCudaOnHost = true;  // CPU tensors stand for CUDA ones
#else
constexpr bool kCudaOnHost = false;
#endif

Dtype dtype_of(const char* op, const char* arg, const Tensor& t) {
  int32_t code = 0;
  aoti_torch_get_dtype(t.get(), &code);
  static const struct {
    int32_t code;
    Dtype dtype;
  } kDtypes[] = {
      {aoti_torch_dtype_float32(), Dtype::f32},
      {aoti_torch_dtype_bfloat16(), Dtype::bf16},
      {aoti_torch_dtype_float16(), Dtype::f16},
      {aoti_torch_dtype_float64(), Dtype::f64},
      {aoti_torch_dtype_int32(), Dtype::i32},
      {aoti_torch_dtype_int64(), Dtype::i64},
      {aoti_torch_dtype_int8(), Dtype::i8},
      {aoti_torch_dtype_uint8(), Dtype::u8},
      {aoti_torch_dtype_float8_e4m3fn(), Dtype::e4m3},
  };
  for (const auto& known : kDtypes) {
    if (known.code == code) return known.dtype;
  }
  fail(op, arg,
       " has an unsupported dtype; supported: float32, bfloat16, float16, float64 on the CPU, and "
       "int32 or int64 for indices");
}

int32_t code_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::f64:
      return aoti_torch_dtype_float64();
    case Dtype::f32:
      return aoti_torch_dtype_float32();
    case Dtype::bf16:
      return aoti_torch_dtype_bfloat16();
    case Dtype::f16:
      return aoti_torch_dtype_float16();
    case Dtype::i64:
      return aoti_torch_dtype_int64();
    case Dtype::i32:
      return aoti_torch_dtype_int32();
    case Dtype::i8:
      return aoti_torch_dtype_int8();
    case Dtype::u8:
      return aoti_torch_dtype_uint8();
    case Dtype::e4m3:
      return aoti_torch_dtype_float8_e4m3fn();
  }
  return -1;
}

enum class Contents { undefined, zeros, sparse_zeros };

Tensor empty(const int64_t* shape, int ndim, Dtype dtype, Device device, Contents contents) {
  int64_t strides[kMaxDims];
  int64_t count = 1;
  for (int i = ndim - 1; i >= 0; --i) {
    strides[i] = count;
    count *= shape[i];
  }
  const bool cuda = device.type == DeviceType::cuda && !kCudaOnHost;
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      ndim, shape, strides, code_of(dtype),
      cuda ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu(), device.index, &handle));
  Tensor t(handle);
  if (cuda) {
    if (contents != Contents::undefined) torch::stable::zero_(t);
    return t;
  }
  const size_t bytes = count * item_size(dtype);
  if (contents != Contents::sparse_zeros) advise_huge_pages(t.data_ptr(), bytes);
  if (contents != Contents::undefined) zero_lazily(t.data_ptr(), bytes);
  return t;
}

// Torch keeps it in a library that CPU builds lack, so it is looked up once that is loaded.
void* current_stream(const char* op, int device) {
  using GetStream = AOTITorchError (*)(int32_t, void**);
  static const auto get = []() -> GetStream {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_NOW);
    if (library == nullptr) return nullptr;
    return reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  check(get != nullptr, op, "finds no libtorch_cuda.so to ask for the current CUDA stream");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return stream;
}

}  // namespace

TensorView view(const char* op, const char* arg, const Tensor& t) {
  TensorView v;
  const int64_t ndim = t.dim();
  check(ndim <= kMaxDims, op, arg, " has ", ndim, " dimensions");
  v.ndim = static_cast<int>(ndim);
  v.dtype = dtype_of(op, arg, t);
  const bool cuda = kCudaOnHost || t.is_cuda();
  v.device = {cuda ? DeviceType::cuda : DeviceType::cpu, kCudaOnHost ? 0 : t.get_device_index()};
  if (v.device.type == DeviceType::cpu) v.device.index = 0;
  v.data = t.data_ptr();
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  for (int i = 0; i < v.ndim; ++i) {
    v.shape[i] = sizes[i];
    v.stride[i] = strides[i];
  }
  return v;
}

TensorView view(const char* op, const char* arg, const OptionalTensor& t) {
  return t ? view(op, arg, *t) : TensorView{};
}

Tensor empty(std::initializer_list<int64_t> shape, Dtype dtype, Device device, bool zeroed) {
  return empty(shape.begin(), static_cast<int>(shape.size()), dtype, device,
               zeroed ? Contents::zeros : Contents::undefined);
}

Tensor empty_like(const TensorView& t, bool zeroed) {
  return empty(t.shape, t.ndim, t.dtype, t.device, zeroed ? Contents::zeros : Contents::undefined);
}

Tensor sparse_zeros(std::initializer_list<int64_t> shape, Dtype dtype, Device device) {
  return empty(shape.begin(), static_cast<int>(shape.size()), dtype, device,
               Contents::sparse_zeros);
}

Tensor gradient(const char* op, int64_t needs, int bit, const TensorView& like, TensorView& to) {
  if (!(needs >> bit & 1) || !given(like)) return empty({0}, like.dtype, like.device);
  Tensor t = empty_like(like);
  to = view(op, "gradient", t);
  return t;
}

OpContext::OpContext(const char* op, Device device) {
  ctx_.device = device;
  if (device.type == DeviceType::cpu) {
    ctx_.num_workers = static_cast<int>(torch::stable::get_num_threads());
    ctx_.run = [](int n, void (*body)(void*, int), void* arg) {
      torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
        for (int64_t w = begin; w < end; ++w) body(arg, static_cast<int>(w));
      });
    };
    return;
  }
  if (!kCudaOnHost) ctx_.stream = current_stream(op, device.index);
  const char* const check_indices = std::getenv("MEMKERNELS_CHECK");
  ctx_.check_indices = check_indices != nullptr && std::strcmp(check_indices, "1") == 0;
  ctx_.arena = &allocated_;
  // Torch hands the memory on only to what the stream runs later.
  ctx_.allocate = [](const Context& ctx, int64_t bytes) {
    auto& allocated = *static_cast<std::vector<Tensor>*>(ctx.arena);
    allocated.push_back(empty({(bytes + 7) / 8}, Dtype::i64, ctx.device));
    return allocated.back().data_ptr();
  };
}

}  // namespace memkernels::binding
