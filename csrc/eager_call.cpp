// prunekern._C.call: one C call checks all tensors of an ordinary eager call, allocates y and runs the
// kernel.
//
// The same in Python asks torch some thirty questions: 4 us where they are warm, 9 us between layers, when
// weights have just gone through the cache, against 70 us for a whole layer at one row. Asked through
// DLPack's exchange ABI they cost a tenth. Whatever is not ordinary (another dtype, device, type, shape,
// stride) gets None: Python then runs it another way, or says what is wrong with it. So there is no error
// message in here.
#include "eager_call.h"

#include "eager_tensor.h"
#include "prunekern/linear.h"

namespace prunekern {
namespace {

// Everything but y from the arguments of `call`; false: not ordinary.
bool read_arguments(PyObject* const* args, LinearCall& call, dlpack::Tensor& x) {
  if (!eager::ready() || !eager::view_input(args[0], x, call.element)) return false;
  if (!eager::to_int(args[5], call.n_out) || !eager::read_activation(args[6], call.activation) ||
      !eager::read_threads(args[8], call.threads))
    return false;
  call.m = eager::count_rows(x);
  call.in_features = x.shape[x.ndim - 1];
  if (call.m == 0 || call.n_out <= 0 || !eager::rows(x, call.m, call.x_stride)) return false;
  call.x = x.data;

  std::int64_t k = call.in_features, n = call.n_out;
  if (args[3] != Py_None && !eager::view_index(args[3], call.in_index, k)) return false;
  if (args[4] != Py_None && !eager::view_index(args[4], call.out_index, n)) return false;
  return eager::read_weight(args[1], args[9], args[2], n, k, call.weight) &&
         eager::read_residual(args[7], x, call.element, call.m, call.n_out, call.residual,
                              call.residual_stride);
}

PyObject* call_fn(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 10) {
    PyErr_Format(PyExc_TypeError, "call takes 10 arguments (got %zd)", count);
    return nullptr;
  }
  LinearCall call;
  dlpack::Tensor x;
  if (!read_arguments(args, call, x)) Py_RETURN_NONE;
  PyObject* y = eager::allocate(args[0], x, call.n_out, call.y);
  if (y == nullptr || y == Py_None) return y;
  call.y_stride = call.n_out;
  return eager::finish(y, [](const void* c) { compact_linear(*static_cast<const LinearCall*>(c)); }, &call);
}

// PyCFunction by way of a function without arguments: gcc warns about the direct cast.
template <class F>
PyCFunction fast(F function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"use_tensor_types", fast(eager::use_tensor_types), METH_FASTCALL,
     "use_tensor_types(Tensor, Parameter) -> whether `call` can look into them."},
    {"call", fast(call_fn), METH_FASTCALL,
     "call(x, packed, bias, in_index, out_index, n_out, activation, residual, threads, scale) -> y, or None "
     "where the checked path must run it. Knows no autograd, no dispatch modes: ask about those first."},
    {"call_mlp", fast(eager_mlp), METH_FASTCALL,
     "call_mlp(x, up, down, gate, 3 biases, 3 scales, in_index, out_index, n_hidden, n_out, activation, "
     "residual, threads) -> y, or None: the same for compact_mlp."},
    {"call_attention", fast(eager_attention), METH_FASTCALL,
     "call_attention(q, k, v, qk_first, v_first, key_mask, scale, shared_by, causal, threads) -> y, or None: "
     "the same for compact_attention."},
    {"call_rotary", fast(eager_rotary), METH_FASTCALL,
     "call_rotary(x, cos, sin, angle, first, shared_by, threads) -> y, or None: the same for rotate_pairs."},
    {"call_norm", fast(eager_norm), METH_FASTCALL,
     "call_norm(x, weight, eps, threads) -> y, or None: the same for rms_norm."},
    {"call_decoder_block", fast(eager_decoder_block), METH_FASTCALL,
     "call_decoder_block(x, cos, sin, keys, values, threads, layer) -> y, or None, and then nothing is "
     "written: "
     "DecoderBlockCall of prunekern/decoder_block.h. keys, values: [batch, 1, past + tokens, channels], the "
     "last "
     "tokens are written. layer: what prunekern/families/decoder_step.py makes."},
    {"unchanged", fast(eager_unchanged), METH_FASTCALL,
     "unchanged((dict, key, value, ...), (dict, ...), (tensor, address, version, ...)) -> whether each value "
     "still is what its dict has (None: or nothing), each dict is empty, and each tensor lies where it lay "
     "and was "
     "not changed in place (version -1: that is not counted)."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

bool add_eager_call(PyObject* module) { return PyModule_AddFunctions(module, methods) == 0; }

}  // namespace prunekern
