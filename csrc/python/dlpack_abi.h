// The part of DLPack's C exchange ABI (major version 1, https://dmlc.github.io/dlpack) that tensors.cpp
// reads: where a tensor lies and what shape it has, in one C call, from any torch >= 2.10 and without its
// headers.
#pragma once

#include <cstdint>

namespace prunekern::dlpack {

constexpr std::int32_t kCpu = 1;
constexpr std::uint8_t kInt = 0, kUint = 1, kFloat = 2, kBfloat = 4, kBool = 6;

struct Tensor {
  void* data;
  std::int32_t device_type, device_id;
  std::int32_t ndim;
  std::uint8_t code, bits;
  std::uint16_t lanes;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};
static_assert(sizeof(Tensor) == 48, "DLTensor");

struct ExchangeApi {
  std::uint32_t major, minor;
  ExchangeApi* older;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  void* managed_tensor_to_py_object;
  int (*tensor_from_py_object)(void* py_object,
                               Tensor* out);  // borrowed, for as long as py_object; may be null
  void* current_work_stream;
};

}  // namespace prunekern::dlpack
