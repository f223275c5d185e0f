// prunekern._C.call_decoder_block: what `call` is for compact_linear, for decoder_block; and `unchanged`,
// which asks whether a layer still is what those arguments were made of.
#include <vector>

#include "eager_call.h"
#include "eager_tensor.h"
#include "prunekern/decoder_block.h"

namespace prunekern {
namespace {

enum Argument { kX, kCos, kSin, kKeys, kValues, kThreads, kLayer, kArguments };

// What belongs to the layer, made once: a tuple.
enum Part {
  kNorm,
  kEps,
  kQkv,  // a weight is three: panels, bias, scale
  kO = kQkv + 3,
  kOutIndex = kO + 3,
  kAngle,
  kKeyFirst,
  kValueFirst,
  kSharedBy,
  kScale,
  kMlpNorm,
  kMlpEps,
  kUp,
  kGate = kUp + 3,
  kDown = kGate + 3,
  kMlpOutIndex = kDown + 3,
  kHidden,
  kActivation,
  kParts
};

bool read_weight(PyObject* const* parts, std::int64_t n, std::int64_t k, Packed& weight) {
  return eager::read_weight(parts[0], parts[2], parts[1], n, k, weight);
}

// [batch, 1, keys, channels] in fp32 with contiguous channels: what a cache of transformers holds.
bool view_cache(PyObject* object, dlpack::Tensor& tensor, float*& data, std::int64_t& batch_stride,
                std::int64_t& stride) {
  Element element;
  if (!eager::view_input(object, tensor, element) || element != Element::fp32 || tensor.ndim != 4)
    return false;
  if (tensor.shape[1] != 1 || (tensor.shape[3] > 1 && tensor.strides[3] != 1)) return false;
  data = static_cast<float*>(tensor.data);
  batch_stride = tensor.strides[0];
  stride = tensor.strides[2];
  return true;
}

bool read_tables(PyObject* const* args, PyObject* angle, std::int64_t pairs, AttentionBlockCall& call) {
  dlpack::Tensor cos, sin;
  std::int64_t length;
  if (!eager::view_tokens(args[kCos], cos, call.cos, call.cos_batch_stride, call.cos_stride) ||
      !eager::view_tokens(args[kSin], sin, call.sin, call.sin_batch_stride, call.sin_stride) ||
      !eager::view_index(angle, call.angle, length) || length != pairs)
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

struct Firsts {
  std::vector<std::int64_t> keys, values;
};

bool read_attention(PyObject* const* args, PyObject* const* parts, AttentionBlockCall& call,
                    dlpack::Tensor& x, Firsts& firsts) {
  Element element;
  dlpack::Tensor keys, values;
  if (!eager::view_input(args[kX], x, element) || element != Element::fp32 || x.ndim != 3 ||
      !view_cache(args[kKeys], keys, call.keys, call.k_batch_stride, call.k_stride) ||
      !view_cache(args[kValues], values, call.values, call.v_batch_stride, call.v_stride))
    return false;
  call.batch = x.shape[0];
  call.tokens = x.shape[1];
  call.hidden = x.shape[2];
  call.past = keys.shape[2] - call.tokens;
  const std::int64_t rows = call.batch * call.tokens;
  if (rows * call.hidden == 0 || call.past < 0 || !eager::rows(x, rows, call.x_stride)) return false;
  call.x = static_cast<const float*>(x.data);
  if (keys.shape[0] != call.batch || values.shape[0] != call.batch || values.shape[2] != keys.shape[2])
    return false;
  if (!eager::to_int(parts[kSharedBy], call.shared_by) || call.shared_by < 1) return false;
  const std::int64_t c = keys.shape[3], d = values.shape[3], made = (call.shared_by + 1) * c + d;
  if (!eager::read_firsts(parts[kKeyFirst], c, firsts.keys) ||
      !eager::read_firsts(parts[kValueFirst], d, firsts.values) || firsts.keys.size() != firsts.values.size())
    return false;
  call.heads = static_cast<std::int64_t>(firsts.keys.size()) - 1;
  call.qk_first = firsts.keys.data();
  call.v_first = firsts.values.data();
  std::int64_t n = call.hidden;
  if (parts[kOutIndex] != Py_None && !eager::view_index(parts[kOutIndex], call.out_index, n)) return false;
  return eager::view_vector(parts[kNorm], call.hidden, call.norm) && eager::to_float(parts[kEps], call.eps) &&
         read_weight(parts + kQkv, made, call.hidden, call.qkv) &&
         read_weight(parts + kO, n, call.shared_by * d, call.o) &&
         read_tables(args, parts[kAngle], c / 2, call) && eager::to_float(parts[kScale], call.scale) &&
         eager::read_threads(args[kThreads], call.threads);
}

bool read_mlp(PyObject* const* parts, DecoderBlockCall& call) {
  const std::int64_t width = call.attention.hidden;
  std::int64_t hidden, n = width;
  if (parts[kMlpOutIndex] != Py_None && !eager::view_index(parts[kMlpOutIndex], call.out_index, n))
    return false;
  return eager::to_int(parts[kHidden], hidden) &&
         eager::read_activation(parts[kActivation], call.activation) &&
         eager::view_vector(parts[kMlpNorm], width, call.norm) && eager::to_float(parts[kMlpEps], call.eps) &&
         read_weight(parts + kUp, hidden, width, call.up) &&
         read_weight(parts + kGate, hidden, width, call.gate) &&
         read_weight(parts + kDown, n, hidden, call.down);
}

// A number of an attribute or a method without arguments; -1 where there is none.
long long number(PyObject* value) {
  const long long got = value == nullptr ? -1 : PyLong_AsLongLong(value);
  Py_XDECREF(value);
  if (PyErr_Occurred() != nullptr) PyErr_Clear();
  return got;
}

}  // namespace

PyObject* eager_decoder_block(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != kArguments || !PyTuple_CheckExact(args[kLayer]) || PyTuple_GET_SIZE(args[kLayer]) != kParts) {
    PyErr_Format(PyExc_TypeError, "call_decoder_block takes %d arguments, the last a tuple of %d",
                 static_cast<int>(kArguments), static_cast<int>(kParts));
    return nullptr;
  }
  PyObject* const* parts = PySequence_Fast_ITEMS(args[kLayer]);
  DecoderBlockCall call;
  dlpack::Tensor x;
  Firsts firsts;
  if (!eager::ready() || !read_attention(args, parts, call.attention, x, firsts) || !read_mlp(parts, call))
    Py_RETURN_NONE;
  void* data = nullptr;
  PyObject* y = eager::allocate(args[kX], x, call.attention.hidden, data);
  if (y == nullptr || y == Py_None) return y;
  call.attention.y = static_cast<float*>(data);
  return eager::finish(
      y, [](const void* c) { decoder_block(*static_cast<const DecoderBlockCall*>(c)); }, &call);
}

PyObject* eager_unchanged(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 3 || !PyTuple_CheckExact(args[0]) || !PyTuple_CheckExact(args[1]) ||
      !PyTuple_CheckExact(args[2]) || PyTuple_GET_SIZE(args[0]) % 3 != 0 ||
      PyTuple_GET_SIZE(args[2]) % 3 != 0) {
    PyErr_SetString(PyExc_TypeError, "unchanged takes 3 tuples, the first and the last of triples");
    return nullptr;
  }
  // Some 60 dicts that lie in memory, cold: asked one after the other they take 14 us.
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args[0]); i += 3)
    __builtin_prefetch(PyTuple_GET_ITEM(args[0], i));
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args[1]); ++i) __builtin_prefetch(PyTuple_GET_ITEM(args[1], i));
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args[0]); i += 3) {
    PyObject* owner = PyTuple_GET_ITEM(args[0], i);
    if (PyDict_Check(owner)) __builtin_prefetch(reinterpret_cast<PyDictObject*>(owner)->ma_keys);
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args[0]); i += 3) {
    PyObject* const* entry = PySequence_Fast_ITEMS(args[0]) + i;
    PyObject* value = PyDict_Check(entry[0]) ? PyDict_GetItemWithError(entry[0], entry[1]) : nullptr;
    if (value == nullptr && PyErr_Occurred() != nullptr) return nullptr;
    if ((value == nullptr ? Py_None : value) != entry[2]) Py_RETURN_FALSE;
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args[1]); ++i) {
    PyObject* hooks = PyTuple_GET_ITEM(args[1], i);
    if (!PyDict_Check(hooks) || PyDict_GET_SIZE(hooks) != 0) Py_RETURN_FALSE;
  }
  static PyObject* const name = PyUnicode_InternFromString("_version");
  if (name == nullptr) return nullptr;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args[2]); i += 3) {
    PyObject* const* entry = PySequence_Fast_ITEMS(args[2]) + i;
    const long long address = PyLong_AsLongLong(entry[1]), version = PyLong_AsLongLong(entry[2]);
    dlpack::Tensor tensor;
    if (!eager::view(entry[0], tensor) || reinterpret_cast<long long>(tensor.data) != address)
      Py_RETURN_FALSE;
    if (version >= 0 && number(PyObject_GetAttr(entry[0], name)) != version) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

}  // namespace prunekern
