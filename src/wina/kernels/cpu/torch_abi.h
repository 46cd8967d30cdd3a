// The part of torch's stable C interface (torch 2.10 and later) that the operators use.
//
// The functions are looked up by name in the torch that is running (see wina_register), so that
// building needs no torch and one library serves every torch version and every Python.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace wina {

using Value = uint64_t;  // an argument or result of an operator: a handle, or a number's bits
using Handle = void*;
using Status = int32_t;  // 0 is success

// name(parameters); all return a Status, but for the first group.
#define WINA_TORCH_CONSTANTS(X)    \
  X(aoti_torch_device_type_cpu)    \
  X(aoti_torch_dtype_bool)         \
  X(aoti_torch_dtype_int8)         \
  X(aoti_torch_dtype_uint8)        \
  X(aoti_torch_dtype_int64)        \
  X(aoti_torch_dtype_float32)      \
  X(aoti_torch_dtype_float64)      \
  X(aoti_torch_dtype_float16)      \
  X(aoti_torch_dtype_bfloat16)
#define WINA_TORCH_FUNCTIONS(X)                                                                \
  X(aoti_torch_get_data_ptr, (Handle tensor, void** data))                                     \
  X(aoti_torch_get_dim, (Handle tensor, int64_t* dim))                                         \
  X(aoti_torch_get_sizes, (Handle tensor, int64_t** sizes))                                    \
  X(aoti_torch_get_strides, (Handle tensor, int64_t** strides))                                \
  X(aoti_torch_get_dtype, (Handle tensor, int32_t* dtype))                                     \
  X(aoti_torch_new_tensor_handle, (Handle tensor, Handle* same))                               \
  X(aoti_torch_delete_tensor_object, (Handle tensor))                                          \
  X(aoti_torch_empty_strided, (int64_t dim, const int64_t* sizes, const int64_t* strides,      \
                               int32_t dtype, int32_t device, int32_t index, Handle* tensor))  \
  X(torch_call_dispatcher, (const char* op, const char* overload, Value* stack, uint64_t abi)) \
  X(torch_new_list_reserve_size, (size_t size, Handle* list))                                  \
  X(torch_list_size, (Handle list, size_t* size))                                              \
  X(torch_list_get_item, (Handle list, size_t i, Value* item))                                 \
  X(torch_list_push_back, (Handle list, Value item))                                           \
  X(torch_delete_list, (Handle list))                                                          \
  X(torch_string_c_str, (Handle string, const char** text))                                    \
  X(torch_delete_string, (Handle string))                                                      \
  X(torch_get_num_threads, (uint32_t* threads))                                                \
  X(torch_parallel_for, (int64_t begin, int64_t end, int64_t grain,                            \
                         void (*body)(int64_t, int64_t, void*), void* context))                \
  X(aoti_torch_library_init_impl, (const char* space, const char* key, const char* file,       \
                                   uint32_t line, Handle* library))                            \
  X(torch_library_impl, (Handle library, const char* op,                                       \
                         void (*function)(Value*, uint64_t, uint64_t), uint64_t abi))

constexpr uint64_t abi_version = (uint64_t(2) << 56) | (uint64_t(10) << 48);

struct Torch {
#define WINA_MEMBER(name) int32_t (*name)();
  WINA_TORCH_CONSTANTS(WINA_MEMBER)
#undef WINA_MEMBER
#define WINA_MEMBER(name, parameters) Status(*name) parameters;
  WINA_TORCH_FUNCTIONS(WINA_MEMBER)
#undef WINA_MEMBER
};

extern Torch torch;

[[noreturn]] inline void fail(const std::string& message) {
  throw std::runtime_error("wina: " + message);
}
inline void check(bool condition, const char* message) {
  if (!condition) fail(message);
}
inline void call(Status status) { check(status == 0, "a call into torch failed"); }

// Owns a reference to a tensor.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(Handle handle) : handle_(handle) {
    call(torch.aoti_torch_get_dim(handle, &dim_));
    call(torch.aoti_torch_get_sizes(handle, &sizes_));
    call(torch.aoti_torch_get_strides(handle, &strides_));
    call(torch.aoti_torch_get_dtype(handle, &dtype_));
    call(torch.aoti_torch_get_data_ptr(handle, &data_));
  }
  Tensor(Tensor&& other) noexcept { *this = std::move(other); }
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    dim_ = other.dim_, sizes_ = other.sizes_, strides_ = other.strides_;
    dtype_ = other.dtype_, data_ = other.data_;
    return *this;
  }
  ~Tensor() {
    if (handle_ != nullptr) torch.aoti_torch_delete_tensor_object(handle_);
  }

  static Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype) {
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t i = sizes.size(); i-- > 1;)
      strides[i - 1] = strides[i] * (sizes[i] > 0 ? sizes[i] : 1);
    Handle handle = nullptr;
    call(torch.aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype,
                                        torch.aoti_torch_device_type_cpu(), 0, &handle));
    return Tensor(handle);
  }

  int64_t dim() const { return dim_; }
  int64_t size(int64_t i) const { return sizes_[i < 0 ? i + dim_ : i]; }
  int64_t stride(int64_t i) const { return strides_[i < 0 ? i + dim_ : i]; }
  std::vector<int64_t> sizes() const { return {sizes_, sizes_ + dim_}; }
  int32_t dtype() const { return dtype_; }
  void* data() const { return data_; }
  bool is_contiguous() const {
    int64_t expected = 1;
    for (int64_t i = dim_ - 1; i >= 0; --i) {
      if (sizes_[i] == 0) return true;
      if (sizes_[i] != 1 && strides_[i] != expected) return false;
      expected *= sizes_[i];
    }
    return true;
  }

  // A new reference, as an argument or a result.
  Value share() const {
    Handle same = nullptr;
    call(torch.aoti_torch_new_tensor_handle(handle_, &same));
    return reinterpret_cast<Value>(same);
  }
  Value release() { return reinterpret_cast<Value>(std::exchange(handle_, nullptr)); }

 private:
  Handle handle_ = nullptr;
  int64_t dim_ = 0;
  int64_t* sizes_ = nullptr;
  int64_t* strides_ = nullptr;
  int32_t dtype_ = -1;
  void* data_ = nullptr;
};

inline Tensor take_tensor(Value value) { return Tensor(reinterpret_cast<Handle>(value)); }

inline std::vector<Tensor> take_tensors(Value value) {
  Handle list = reinterpret_cast<Handle>(value);
  size_t size = 0;
  call(torch.torch_list_size(list, &size));
  std::vector<Tensor> tensors;
  tensors.reserve(size);
  for (size_t i = 0; i < size; ++i) {
    Value item = 0;
    call(torch.torch_list_get_item(list, i, &item));
    tensors.push_back(take_tensor(item));
  }
  call(torch.torch_delete_list(list));
  return tensors;
}

inline std::vector<int64_t> take_numbers(Value value) {
  Handle list = reinterpret_cast<Handle>(value);
  size_t size = 0;
  call(torch.torch_list_size(list, &size));
  std::vector<int64_t> numbers(size);
  for (size_t i = 0; i < size; ++i)
    call(torch.torch_list_get_item(list, i, reinterpret_cast<Value*>(&numbers[i])));
  call(torch.torch_delete_list(list));
  return numbers;
}

inline Value give_numbers(const std::vector<int64_t>& numbers) {
  Handle list = nullptr;
  call(torch.torch_new_list_reserve_size(numbers.size(), &list));
  for (int64_t number : numbers) call(torch.torch_list_push_back(list, Value(number)));
  return reinterpret_cast<Value>(list);
}

inline Value give_tensors(std::vector<Tensor> tensors) {
  Handle list = nullptr;
  call(torch.torch_new_list_reserve_size(tensors.size(), &list));
  for (Tensor& tensor : tensors) call(torch.torch_list_push_back(list, tensor.release()));
  return reinterpret_cast<Value>(list);
}

inline std::string take_string(Value value) {
  Handle string = reinterpret_cast<Handle>(value);
  const char* text = nullptr;
  call(torch.torch_string_c_str(string, &text));
  std::string copy(text);
  call(torch.torch_delete_string(string));
  return copy;
}

}  // namespace wina
