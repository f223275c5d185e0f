// What the eager calls ask torch's tensors, through DLPack's exchange ABI: a tenth of the time the same takes
// in Python. Everything here answers false where a tensor is not ordinary; there are no error messages.
#pragma once

#include <Python.h>

#include <cstdint>

#include "prunekern/linear.h"
#include "python/dlpack_abi.h"

namespace prunekern::eager {

constexpr int kMaxDims = 8;

// Whether torch can be asked: use_tensor_types was called, and this torch has the ABI (>= 2.10).
bool ready();

// A tensor of the exact types given to use_tensor_types (no other subclass: it may not be what it holds), on
// the CPU.
bool view(PyObject* object, dlpack::Tensor& tensor);

bool is(const dlpack::Tensor& tensor, std::uint8_t code, std::uint8_t bits);

// Row-major without holes, by the strides of what has more than one element.
bool is_contiguous(const dlpack::Tensor& tensor);

// The same for int64 kept channels: contiguous, any length.
bool view_index(PyObject* object, const std::int64_t*& index, std::int64_t& length);

// fp32 [length], contiguous, without a minus sign that torch keeps aside (x.conj().imag).
bool view_vector(PyObject* object, std::int64_t length, const float*& data);

// The same for x and residual: fp32 or bf16, without a minus sign that torch keeps aside (x.conj().imag).
bool view_input(PyObject* object, dlpack::Tensor& tensor, Element& element);

// [batch, tokens, channels] in fp32 with contiguous channels.
bool view_tokens(PyObject* object, dlpack::Tensor& tensor, const float*& data, std::int64_t& batch_stride,
                 std::int64_t& stride);

// [..., n] as rows of one stride, `count` in all; false where no single stride describes them.
bool rows(const dlpack::Tensor& tensor, std::int64_t count, std::int64_t& stride);
std::int64_t count_rows(const dlpack::Tensor& tensor);

// x.new_empty(*x.shape[:-1], n_out), or null with a Python error set, or a Python None where the result is no
// plain tensor. `data` points into it.
PyObject* allocate(PyObject* x_object, const dlpack::Tensor& x, std::int64_t n_out, void*& data);

// Whether the eager calls can look into tensors of these types: torch.Tensor, Parameter, and ours that counts
// reads of `.data`. May leave a Python error.
bool use_tensor_types(PyObject* tensor, PyObject* parameter, PyObject* watched);

}  // namespace prunekern::eager
