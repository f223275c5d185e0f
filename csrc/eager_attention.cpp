// prunekern._C.call_attention: what `call` is for compact_linear, for compact_attention: 3 us where the
// questions asked in Python take 20, against 400 us for twelve heads of 128 tokens.
#include <vector>

#include "eager_call.h"
#include "eager_tensor.h"
#include "prunekern/attention.h"

namespace prunekern {
namespace {

// A tuple of ints from 0 to `last`; that they do not descend is for the core to say.
bool read_firsts(PyObject* object, std::int64_t last, std::vector<std::int64_t>& firsts) {
  if (!PyTuple_CheckExact(object)) return false;
  const Py_ssize_t count = PyTuple_GET_SIZE(object);
  firsts.resize(count);
  for (Py_ssize_t i = 0; i < count; ++i)
    if (!eager::to_int(PyTuple_GET_ITEM(object, i), firsts[i])) return false;
  return count > 0 && firsts.front() == 0 && firsts.back() == last;
}

// [batch, tokens, channels] in fp32 with contiguous channels.
bool read_tokens(PyObject* object, dlpack::Tensor& tensor, const float*& data, std::int64_t& batch_stride,
                 std::int64_t& stride) {
  Element element;
  if (!eager::view_input(object, tensor, element) || element != Element::fp32 || tensor.ndim != 3)
    return false;
  if (tensor.shape[2] > 1 && tensor.strides[2] != 1) return false;
  data = static_cast<const float*>(tensor.data);
  batch_stride = tensor.strides[0];
  stride = tensor.strides[1];
  return true;
}

bool read_mask(PyObject* object, AttentionCall& call) {
  if (object == Py_None) return true;
  dlpack::Tensor mask;
  if (!eager::view(object, mask) || mask.code != dlpack::kBool || mask.bits != 8 || mask.ndim != 2)
    return false;
  if (mask.shape[0] != call.batch || mask.shape[1] != call.keys) return false;
  if (mask.shape[1] > 1 && mask.strides[1] != 1) return false;
  call.key_mask = static_cast<const bool*>(mask.data);
  call.key_mask_stride = mask.strides[0];
  return true;
}

bool read_arguments(PyObject* const* args, AttentionCall& call, dlpack::Tensor& q,
                    std::vector<std::int64_t>& qk_first, std::vector<std::int64_t>& v_first) {
  dlpack::Tensor k, v;
  if (!eager::ready() || !read_tokens(args[0], q, call.q, call.q_batch_stride, call.q_stride) ||
      !read_tokens(args[1], k, call.k, call.k_batch_stride, call.k_stride) ||
      !read_tokens(args[2], v, call.v, call.v_batch_stride, call.v_stride))
    return false;
  call.batch = q.shape[0];
  call.queries = q.shape[1];
  call.keys = k.shape[1];
  if (k.shape[0] != call.batch || k.shape[2] != q.shape[2]) return false;
  if (v.shape[0] != call.batch || v.shape[1] != call.keys) return false;
  if (!read_firsts(args[3], q.shape[2], qk_first) || !read_firsts(args[4], v.shape[2], v_first)) return false;
  if (qk_first.size() != v_first.size() || call.batch * call.queries * v_first.back() == 0) return false;
  call.heads = static_cast<std::int64_t>(qk_first.size()) - 1;
  call.qk_first = qk_first.data();
  call.v_first = v_first.data();
  if (!read_mask(args[5], call) || !PyFloat_CheckExact(args[6])) return false;
  call.scale = static_cast<float>(PyFloat_AS_DOUBLE(args[6]));
  return eager::read_threads(args[7], call.threads);
}

}  // namespace

PyObject* eager_attention(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 8) {
    PyErr_Format(PyExc_TypeError, "call_attention takes 8 arguments (got %zd)", count);
    return nullptr;
  }
  AttentionCall call;
  dlpack::Tensor q;
  std::vector<std::int64_t> qk_first, v_first;
  if (!read_arguments(args, call, q, qk_first, v_first)) Py_RETURN_NONE;
  void* data = nullptr;
  PyObject* y = eager::allocate(args[0], q, v_first.back(), data);
  if (y == nullptr || y == Py_None) return y;
  call.y = static_cast<float*>(data);
  call.y_stride = v_first.back();
  call.y_batch_stride = call.queries * call.y_stride;
  return eager::finish(
      y, [](const void* c) { compact_attention(*static_cast<const AttentionCall*>(c)); }, &call);
}

}  // namespace prunekern
