// What the eager calls ask torch's tensors, through DLPack's exchange ABI: a tenth of the time the same takes
// in Python. Everything here answers false where a tensor is not ordinary; there are no error messages.
#pragma once

#include <Python.h>

#include <cstdint>
#include <vector>

#include "dlpack_abi.h"
#include "prunekern/linear.h"

namespace prunekern::eager {

constexpr int kMaxDims = 8;

// Whether torch can be asked: use_tensor_types was called, and this torch has the ABI (>= 2.10).
bool ready();

// A tensor of the exact types torch.Tensor or Parameter (no subclass: it may not be what it holds), on the
// CPU.
bool view(PyObject* object, dlpack::Tensor& tensor);

// The same for int64 kept channels: contiguous, any length.
bool view_index(PyObject* object, const std::int64_t*& index, std::int64_t& length);

// fp32 [length], contiguous, without a minus sign that torch keeps aside (x.conj().imag).
bool view_vector(PyObject* object, std::int64_t length, const float*& data);

// The same for x and residual: fp32 or bf16, without a minus sign that torch keeps aside (x.conj().imag).
bool view_input(PyObject* object, dlpack::Tensor& tensor, Element& element);

// [batch, tokens, channels] in fp32 with contiguous channels.
bool view_tokens(PyObject* object, dlpack::Tensor& tensor, const float*& data, std::int64_t& batch_stride,
                 std::int64_t& stride);

// A tuple of ints from 0 to `last`; that they do not descend is for the core to say.
bool read_firsts(PyObject* object, std::int64_t last, std::vector<std::int64_t>& firsts);

// [..., n] as rows of one stride, `count` in all; false where no single stride describes them.
bool rows(const dlpack::Tensor& tensor, std::int64_t count, std::int64_t& stride);
std::int64_t count_rows(const dlpack::Tensor& tensor);

// A residual for y [*x.shape[:-1], n_out] of x's element; Py_None is none.
bool read_residual(PyObject* object, const dlpack::Tensor& x, Element element, std::int64_t m,
                   std::int64_t n_out, const void*& data, std::int64_t& stride);

// pack_weight's panels of a weight [n, k], its scale and bias (both fp32, or None).
bool read_weight(PyObject* packed, PyObject* scale, PyObject* bias, std::int64_t n, std::int64_t k,
                 Packed& weight);

bool to_int(PyObject* object, std::int64_t& value);
bool to_float(PyObject* object, float& value);
bool read_activation(PyObject* object, Activation& activation);
bool read_threads(PyObject* object, int& threads);

// x.new_empty(*x.shape[:-1], n_out), or null with a Python error set, or a Python None where the result is no
// plain tensor. `data` points into it.
PyObject* allocate(PyObject* x_object, const dlpack::Tensor& x, std::int64_t n_out, void*& data);

// Runs the core without the GIL; an exception becomes a Python error and drops y.
PyObject* finish(PyObject* y, void (*run)(const void* call), const void* call);

// use_tensor_types(Tensor, Parameter) -> whether the eager calls can look into them.
PyObject* use_tensor_types(PyObject*, PyObject* const* args, Py_ssize_t count);

}  // namespace prunekern::eager
