// Arguments of eager calls. As in tensors.h the answer is false where one is not ordinary.
#pragma once

#include <Python.h>

#include <cstdint>
#include <vector>

#include "prunekern/linear.h"
#include "python/tensors.h"

namespace prunekern::eager {

// A tuple of ints from 0 (to `last`); that they do not descend is for the core to say.
bool read_firsts(PyObject* object, std::vector<std::int64_t>& firsts);
bool read_firsts(PyObject* object, std::int64_t last, std::vector<std::int64_t>& firsts);

// A residual for y [*x.shape[:-1], n_out] of x's element; Py_None is none.
bool read_residual(PyObject* object, const dlpack::Tensor& x, Element element, std::int64_t m,
                   std::int64_t n_out, const void*& data, std::int64_t& stride);

// pack_weight's panels of a weight [n, k], its scale and bias (both fp32, or None), and what becomes of x.
bool read_weight(PyObject* packed, PyObject* scale, PyObject* bias, PyObject* activations, std::int64_t n,
                 std::int64_t k, Packed& weight);

bool to_int(PyObject* object, std::int64_t& value);
bool to_float(PyObject* object, float& value);
bool read_activation(PyObject* object, Activation& activation);
bool read_threads(PyObject* object, int& threads);

// Kept channels, and how many; Py_None: all, and `length` stays as it is.
bool read_index(PyObject* object, const std::int64_t*& index, std::int64_t& length);

// bool [batch, keys], true where a key may be read; Py_None: all, and both stay as they are.
bool read_key_mask(PyObject* object, std::int64_t batch, std::int64_t keys, const bool*& mask,
                   std::int64_t& stride);

// cos and sin [batch or 1, tokens, angles] of a call with a batch and tokens (RotaryCall or
// AttentionBlockCall).
template <class Call>
bool read_tables(PyObject* cos_object, PyObject* sin_object, Call& call) {
  dlpack::Tensor cos, sin;
  if (!view_tokens(cos_object, cos, call.cos, call.cos_batch_stride, call.cos_stride) ||
      !view_tokens(sin_object, sin, call.sin, call.sin_batch_stride, call.sin_stride))
    return false;
  call.angles = cos.shape[2];
  for (const dlpack::Tensor* table : {&cos, &sin}) {
    if (table->shape[1] != call.tokens || table->shape[2] != call.angles) return false;
    if (table->shape[0] != call.batch && table->shape[0] != 1) return false;
  }
  if (cos.shape[0] == 1) call.cos_batch_stride = 0;
  if (sin.shape[0] == 1) call.sin_batch_stride = 0;
  return true;
}

}  // namespace prunekern::eager
