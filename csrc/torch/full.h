// Tensors, arguments and registration through torch's C++ classes (torch 2.4 to 2.9): one build for
// each minor release. The names are those of stable.h.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <ATen/ops/empty_strided.h>
#include <torch/csrc/inductor/inductor_ops.h>
#include <torch/library.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

// It lives in libtorch_cuda, which a CPU build of torch lacks; importing must not need it.
#if defined(__GNUC__)
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t, void**);
#endif

namespace flash::shim {

enum class Dtype { kHalf, kBfloat16, kE4m3, kFloat, kInt, kLong, kOther };

inline at::ScalarType code(Dtype dtype) {
  switch (dtype) {
    case Dtype::kHalf:
      return at::kHalf;
    case Dtype::kBfloat16:
      return at::kBFloat16;
    case Dtype::kE4m3:
      return at::kFloat8_e4m3fn;
    case Dtype::kFloat:
      return at::kFloat;
    case Dtype::kInt:
      return at::kInt;
    default:
      return at::kLong;
  }
}

// An owned reference to a tensor, or none.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(at::Tensor tensor) : tensor_(std::move(tensor)) {}
  Tensor(Tensor&&) noexcept = default;
  Tensor& operator=(Tensor&&) noexcept = default;
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;

  explicit operator bool() const { return tensor_.defined(); }
  const at::Tensor& get() const { return tensor_; }

  // A second reference to the same tensor.
  Tensor share() const { return Tensor(tensor_); }

  int64_t dim() const { return tensor_.dim(); }
  // An index below zero counts from the last dimension.
  int64_t size(int64_t i) const { return tensor_.sizes()[at_index(i)]; }
  int64_t stride(int64_t i) const { return tensor_.strides()[at_index(i)]; }
  void* data() const { return tensor_.data_ptr(); }

  Dtype dtype() const {
    for (Dtype dtype :
         {Dtype::kBfloat16, Dtype::kHalf, Dtype::kE4m3, Dtype::kFloat, Dtype::kInt, Dtype::kLong}) {
      if (tensor_.scalar_type() == code(dtype)) return dtype;
    }
    return Dtype::kOther;
  }

  int32_t device_type() const { return static_cast<int32_t>(tensor_.device().type()); }
  int32_t device_index() const { return tensor_.device().index(); }

 private:
  size_t at_index(int64_t i) const { return static_cast<size_t>(i < 0 ? i + tensor_.dim() : i); }

  at::Tensor tensor_;
};

// Uninitialised, on the device of `like`.
inline Tensor empty_strided(const int64_t* sizes, const int64_t* strides, int64_t dim, Dtype dtype,
                            const Tensor& like) {
  const auto count = static_cast<size_t>(dim);
  return Tensor(
      at::empty_strided({sizes, count}, {strides, count}, like.get().options().dtype(code(dtype))));
}

// A view from the first element of `x` on, of which autograd knows nothing.
inline Tensor view(const Tensor& x, const int64_t* sizes, const int64_t* strides, int64_t dim) {
  const auto count = static_cast<size_t>(dim);
  return Tensor(torch::inductor::_reinterpret_tensor(x.get(), {sizes, count}, {strides, count}));
}

inline void copy(const Tensor& to, const Tensor& from) {
  at::Tensor(to.get()).copy_(from.get(), /*non_blocking=*/true);
}

inline void zero(const Tensor& x) { at::Tensor(x.get()).zero_(); }

// Fills x from torch's generator, so that seeds and CUDA graphs govern the draw.
inline void draw(const Tensor& x) { at::Tensor(x.get()).random_(); }

inline void* current_stream(int32_t device) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream == nullptr) {
    throw std::runtime_error("flash_attn: this torch is built without CUDA");
  }
  if (aoti_torch_get_current_cuda_stream(device, &stream) != 0) {
    throw std::runtime_error("flash_attn: get_current_cuda_stream");
  }
  return stream;
}

// The arguments of an operator, taken in the order of its schema.
class Arguments {
 public:
  explicit Arguments(const std::vector<c10::IValue>& values, size_t first)
      : values_(values), next_(first) {}

  Tensor tensor() { return Tensor(take().toTensor()); }

  Tensor optional_tensor() {
    const c10::IValue& value = take();
    return value.isNone() ? Tensor() : Tensor(value.toTensor());
  }

  int64_t integer() { return take().toInt(); }

  std::optional<int64_t> optional_integer() {
    const c10::IValue& value = take();
    return value.isNone() ? std::nullopt : std::optional<int64_t>(value.toInt());
  }

  double number() { return take().toDouble(); }

  std::optional<double> optional_number() {
    const c10::IValue& value = take();
    return value.isNone() ? std::nullopt : std::optional<double>(value.toDouble());
  }

  bool flag() { return take().toBool(); }

  std::optional<bool> optional_flag() {
    const c10::IValue& value = take();
    return value.isNone() ? std::nullopt : std::optional<bool>(value.toBool());
  }

 private:
  const c10::IValue& take() { return values_[next_++]; }

  const std::vector<c10::IValue>& values_;
  size_t next_;
};

class Results {
 public:
  void add(Tensor tensor) { values_.emplace_back(tensor.get()); }
  std::vector<c10::IValue>& values() { return values_; }

 private:
  std::vector<c10::IValue> values_;
};

using Op = void (*)(Arguments&, Results&);

template <Op op>
void boxed(const c10::OperatorHandle& handle, torch::jit::Stack* stack) {
  const size_t first = stack->size() - handle.schema().arguments().size();
  Arguments arguments(*stack, first);
  Results results;
  op(arguments, results);
  stack->resize(first);
  for (c10::IValue& value : results.values()) stack->push_back(std::move(value));
}

// A set of operator definitions and implementations; they go with it.
class Library {
 public:
  // Implementations of operators for a dispatch key; with a null key, new operators.
  Library(const char* space, const char* key)
      : library_(key == nullptr ? torch::Library::FRAGMENT : torch::Library::IMPL, space,
                 key == nullptr ? std::nullopt : std::make_optional(c10::parseDispatchKey(key)),
                 __FILE__, __LINE__) {}

  void define(const char* schema) { library_.def(schema); }

  template <Op op>
  void implement(const char* name) {
    library_.impl(name, torch::CppFunction::makeFromBoxedFunction<&boxed<op>>());
  }

 private:
  torch::Library library_;
};

}  // namespace flash::shim
