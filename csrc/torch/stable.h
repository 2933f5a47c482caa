// Tensors, arguments and registration through torch's stable ABI (torch >= 2.10): one build serves
// every later torch and every Python.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

// It lives in libtorch_cuda, which a CPU build of torch lacks; importing must not need it.
#if defined(__GNUC__)
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
#endif

namespace flash::shim {

inline void ok(AOTITorchError error, const char* what) {
  if (error != AOTI_TORCH_SUCCESS) throw std::runtime_error(std::string("flash_attn: ") + what);
}

enum class Dtype { kHalf, kBfloat16, kE4m3, kFloat, kInt, kLong, kUlong, kOther };

inline int32_t code(Dtype dtype) {
  switch (dtype) {
    case Dtype::kHalf:
      return aoti_torch_dtype_float16();
    case Dtype::kBfloat16:
      return aoti_torch_dtype_bfloat16();
    case Dtype::kE4m3:
      return aoti_torch_dtype_float8_e4m3fn();
    case Dtype::kFloat:
      return aoti_torch_dtype_float32();
    case Dtype::kInt:
      return aoti_torch_dtype_int32();
    case Dtype::kUlong:
      return aoti_torch_dtype_uint64();
    default:
      return aoti_torch_dtype_int64();
  }
}

// An owned reference to a tensor, or none.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {
    if (handle == nullptr) return;
    ok(aoti_torch_get_dim(handle, &dim_), "get_dim");
    ok(aoti_torch_get_sizes(handle, &sizes_), "get_sizes");
    ok(aoti_torch_get_strides(handle, &strides_), "get_strides");
  }
  Tensor(Tensor&& other) noexcept { swap(other); }
  Tensor& operator=(Tensor&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Tensor() {
    if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
  }

  explicit operator bool() const { return handle_ != nullptr; }
  AtenTensorHandle get() const { return handle_; }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }

  // A second reference to the same tensor.
  Tensor share() const {
    AtenTensorHandle copy = nullptr;
    if (handle_ != nullptr) ok(aoti_torch_new_tensor_handle(handle_, &copy), "new_tensor_handle");
    return Tensor(copy);
  }

  int64_t dim() const { return dim_; }
  // An index below zero counts from the last dimension.
  int64_t size(int64_t i) const { return sizes_[i < 0 ? i + dim_ : i]; }
  int64_t stride(int64_t i) const { return strides_[i < 0 ? i + dim_ : i]; }

  void* data() const {
    void* pointer = nullptr;
    ok(aoti_torch_get_data_ptr(handle_, &pointer), "get_data_ptr");
    return pointer;
  }

  Dtype dtype() const {
    int32_t found = 0;
    ok(aoti_torch_get_dtype(handle_, &found), "get_dtype");
    for (Dtype dtype :
         {Dtype::kBfloat16, Dtype::kHalf, Dtype::kE4m3, Dtype::kFloat, Dtype::kInt, Dtype::kLong}) {
      if (found == code(dtype)) return dtype;
    }
    return Dtype::kOther;
  }

  int32_t device_type() const {
    int32_t type = 0;
    ok(aoti_torch_get_device_type(handle_, &type), "get_device_type");
    return type;
  }

  int32_t device_index() const {
    int32_t index = 0;
    ok(aoti_torch_get_device_index(handle_, &index), "get_device_index");
    return index;
  }

 private:
  void swap(Tensor& other) {
    std::swap(handle_, other.handle_);
    std::swap(dim_, other.dim_);
    std::swap(sizes_, other.sizes_);
    std::swap(strides_, other.strides_);
  }

  AtenTensorHandle handle_ = nullptr;
  int64_t dim_ = 0;
  int64_t* sizes_ = nullptr;
  int64_t* strides_ = nullptr;
};

// Uninitialised, on the device of `like`.
inline Tensor empty_strided(const int64_t* sizes, const int64_t* strides, int64_t dim, Dtype dtype,
                            const Tensor& like) {
  AtenTensorHandle made = nullptr;
  ok(aoti_torch_empty_strided(dim, sizes, strides, code(dtype), like.device_type(),
                              like.device_index(), &made),
     "out of memory");
  return Tensor(made);
}

// A view from the first element of `x` on, of which autograd knows nothing.
inline Tensor view(const Tensor& x, const int64_t* sizes, const int64_t* strides, int64_t dim) {
  int64_t offset = 0;
  AtenTensorHandle made = nullptr;
  ok(aoti_torch_get_storage_offset(x.get(), &offset), "storage_offset");
  ok(aoti_torch__reinterpret_tensor(x.get(), dim, sizes, strides, offset, &made), "as_strided");
  return Tensor(made);
}

inline void copy(const Tensor& to, const Tensor& from) {
  ok(aoti_torch_copy_(to.get(), from.get(), 1), "copy_");
}

inline void zero(const Tensor& x) { ok(aoti_torch_zero_(x.get()), "zero_"); }

// Fills x from torch's generator, so that seeds and CUDA graphs govern the draw.
inline void draw(const Tensor& x) {
  StableIValue stack[2] = {0, 0};  // self, generator=None
  const AtenTensorHandle self = x.share().release();
  std::memcpy(&stack[0], &self, sizeof(self));
  ok(torch_call_dispatcher("aten::random_", "", stack, TORCH_ABI_VERSION), "random_");
  AtenTensorHandle result = nullptr;
  std::memcpy(&result, &stack[0], sizeof(result));
  const Tensor returned(result);
}

// The elements of `x` under another dtype of their size.
inline Tensor reinterpreted(const Tensor& x, Dtype dtype) {
  StableIValue stack[2] = {0, 0};
  const AtenTensorHandle self = x.share().release();
  const int32_t wanted = code(dtype);
  std::memcpy(&stack[0], &self, sizeof(self));
  std::memcpy(&stack[1], &wanted, sizeof(wanted));
  ok(torch_call_dispatcher("aten::view", "dtype", stack, TORCH_ABI_VERSION), "view");
  AtenTensorHandle result = nullptr;
  std::memcpy(&result, &stack[0], sizeof(result));
  return Tensor(result);
}

inline void* current_stream(int32_t device) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream == nullptr) {
    throw std::runtime_error("flash_attn: this torch is built without CUDA");
  }
  ok(aoti_torch_get_current_cuda_stream(device, &stream), "get_current_cuda_stream");
  return stream;
}

// The arguments of an operator, taken in the order of its schema. Take all before anything throws:
// what is not taken leaks.
class Arguments {
 public:
  explicit Arguments(const StableIValue* at) : at_(at) {}

  Tensor tensor() { return Tensor(take<AtenTensorHandle>()); }

  Tensor optional_tensor() {
    const auto value = optional<AtenTensorHandle>();
    return value ? Tensor(*value) : Tensor();
  }

  int64_t integer() { return take<int64_t>(); }
  std::optional<int64_t> optional_integer() { return optional<int64_t>(); }
  double number() { return take<double>(); }
  std::optional<double> optional_number() { return optional<double>(); }
  bool flag() { return take<bool>(); }
  std::optional<bool> optional_flag() { return optional<bool>(); }

 private:
  template <class T>
  T take() {
    T value;
    std::memcpy(&value, at_++, sizeof(value));
    return value;
  }

  template <class T>
  std::optional<T> optional() {
    StableIValue* boxed = take<StableIValue*>();
    if (boxed == nullptr) return std::nullopt;
    T value;
    std::memcpy(&value, boxed, sizeof(value));
    delete boxed;
    return value;
  }

  const StableIValue* at_;
};

class Results {
 public:
  explicit Results(StableIValue* at) : at_(at) {}

  void add(Tensor tensor) { put(tensor.release()); }
  void add(int64_t value) { put(value); }

  // A tensor that there is none of.
  void add_undefined() {
    AtenTensorHandle handle = nullptr;
    ok(aoti_torch_new_uninitialized_tensor(&handle), "new_uninitialized_tensor");
    put(handle);
  }

 private:
  template <class T>
  void put(T value) {
    *at_ = 0;
    std::memcpy(at_++, &value, sizeof(value));
  }

  StableIValue* at_;
};

using Op = void (*)(Arguments&, Results&);

template <Op op>
void boxed(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  Results results(stack);
  op(arguments, results);
}

// A set of operator definitions and implementations; they go with it.
class Library {
 public:
  // Implementations of operators for a dispatch key; with a null key, new operators.
  Library(const char* space, const char* key) {
    if (key == nullptr) {
      ok(aoti_torch_library_init_fragment(space, __FILE__, __LINE__, &handle_), "library");
    } else {
      ok(aoti_torch_library_init_impl(space, key, __FILE__, __LINE__, &handle_), "library");
    }
  }

  ~Library() { aoti_torch_delete_library_object(handle_); }
  Library(const Library&) = delete;
  Library& operator=(const Library&) = delete;

  void define(const char* schema) { ok(aoti_torch_library_def(handle_, schema), schema); }

  template <Op op>
  void implement(const char* name) {
    ok(torch_library_impl(handle_, name, &boxed<op>, TORCH_ABI_VERSION), name);
  }

 private:
  TorchLibraryHandle handle_ = nullptr;
};

}  // namespace flash::shim
