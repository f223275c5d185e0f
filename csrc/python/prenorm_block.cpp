// prunekern._C: prenorm_block, as an eager call only.
#include "prunekern/prenorm_block.h"

#include "python/block_arguments.h"
#include "python/module.h"

namespace prunekern {
namespace {

enum Argument { kX, kCos, kSin, kKeyMask, kWindow, kThreads, kLayer, kArgumentCount };

// What belongs to the layer, made once: a tuple.
enum Part {
  kNorm,             // a norm is three: weight, bias, eps; weight None: there is no norm
  kQkv = kNorm + 3,  // a weight is four: panels, bias, scale, activations
  kAngle = kQkv + 4,
  kKeyFirst,
  kValueFirst,
  kScale,
  kArithmetic,
  kO,
  kOutIndex = kO + 4,
  kMlpNorm,
  kUp = kMlpNorm + 3,
  kGate = kUp + 4,
  kDown = kGate + 4,
  kMlpOutIndex = kDown + 4,
  kInner,
  kActivation,
  kParts
};

bool read_norm(PyObject* const* parts, std::int64_t n, NormOf& norm) {
  return eager::view_vector(parts[0], n, norm.weight) &&
         (parts[1] == Py_None || eager::view_vector(parts[1], n, norm.bias)) &&
         eager::to_float(parts[2], norm.eps);
}

struct EagerPrenormBlock {
  static constexpr const char* kName = "call_prenorm_block";
  static constexpr int kArguments = kArgumentCount;

  bool read(PyObject* const* args) {
    if (!PyTuple_CheckExact(args[kLayer]) || PyTuple_GET_SIZE(args[kLayer]) != kParts) {
      PyErr_Format(PyExc_TypeError, "call_prenorm_block: layer must be a tuple of %d",
                   static_cast<int>(kParts));
      return false;
    }
    PyObject* const* parts = PySequence_Fast_ITEMS(args[kLayer]);
    return read_x(args) && read_attention(parts) && read_mlp(parts);
  }
  std::int64_t channels() const { return block.hidden; }
  void write_to(void* y) { block.y = static_cast<float*>(y); }
  void run() const { prenorm_block(block); }

  dlpack::Tensor x;
  Firsts keys, values;
  PrenormBlockCall block;

 private:
  bool read_x(PyObject* const* args) {
    return eager::read_states(args[kX], x, block) && eager::read_tables(args[kCos], args[kSin], block) &&
           eager::read_key_mask(args[kKeyMask], block.batch, block.tokens, block.key_mask,
                                block.key_mask_stride) &&
           eager::to_int(args[kWindow], block.window) && eager::read_threads(args[kThreads], block.threads);
  }

  bool read_attention(PyObject* const* parts) {
    std::int64_t pairs, n = block.hidden;
    if (!eager::read_heads(parts[kKeyFirst], parts[kValueFirst], parts[kArithmetic], keys, values, block))
      return false;
    if (parts[kNorm] != Py_None && !read_norm(parts + kNorm, block.hidden, block.norm)) return false;
    return eager::read_weight(parts + kQkv, 2 * keys.back() + values.back(), block.hidden, block.qkv) &&
           eager::view_index(parts[kAngle], block.angle, pairs) && 2 * pairs == keys.back() &&
           eager::read_index(parts[kOutIndex], block.out_index, n) &&
           eager::read_weight(parts + kO, n, values.back(), block.o) &&
           eager::to_float(parts[kScale], block.scale);
  }

  bool read_mlp(PyObject* const* parts) {
    std::int64_t inner, n = block.hidden;
    return read_norm(parts + kMlpNorm, block.hidden, block.mlp_norm) && eager::to_int(parts[kInner], inner) &&
           eager::read_weight(parts + kUp, inner, block.hidden, block.up) &&
           eager::read_weight(parts + kGate, inner, block.hidden, block.gate) &&
           eager::read_index(parts[kMlpOutIndex], block.mlp_out_index, n) &&
           eager::read_weight(parts + kDown, n, inner, block.down) &&
           eager::read_activation(parts[kActivation], block.activation);
  }
};

}  // namespace

void add_prenorm_block(pybind11::module_& m) {
  eager::add_call<EagerPrenormBlock>(
      m,
      "call_prenorm_block(x, cos, sin, key_mask, window, threads, layer) -> y, or None: PrenormBlockCall of "
      "prunekern/prenorm_block.h; window negative where all keys are near enough. layer: what "
      "prunekern/families makes for an encoder's step.");
}

}  // namespace prunekern
