// prunekern._C: blocks of an encoder, as an eager call only.
#include "prunekern/encoder_block.h"

#include "python/block_arguments.h"
#include "python/module.h"

namespace prunekern {
namespace {

enum Argument { kX, kKeyMask, kBias, kThreads, kLayers, kArgumentCount };

// What belongs to a layer, made once: a tuple.
enum Part {
  kQkv,  // a weight is four: panels, bias, scale, activations
  kO = kQkv + 4,
  kOutIndex = kO + 4,
  kKeyFirst,
  kValueFirst,
  kBiasHead,  // a tuple: the matrix of the bias that each head reads; None where none is given
  kScale,
  kArithmetic,
  kNorm,  // a norm is three: weight, bias, eps
  kUp = kNorm + 3,
  kDown = kUp + 4,
  kMlpOutIndex = kDown + 4,
  kInner,
  kActivation,
  kMlpNorm,
  kParts = kMlpNorm + 3
};

bool read_norm(PyObject* const* parts, std::int64_t n, NormOf& norm) {
  return eager::view_vector(parts[0], n, norm.weight) && eager::view_vector(parts[1], n, norm.bias) &&
         eager::to_float(parts[2], norm.eps);
}

// A block, and what its call only points to.
struct Layer {
  EncoderBlockCall block;
  Firsts keys, values;
  std::vector<std::int64_t> bias_head;
};

// Blocks one after the other: what comes out of one is what the next one reads, in place.
struct EagerEncoderBlocks {
  static constexpr const char* kName = "call_encoder_blocks";
  static constexpr int kArguments = kArgumentCount;

  bool read(PyObject* const* args) {
    PyObject* tuple = args[kLayers];
    if (!PyTuple_CheckExact(tuple) || PyTuple_GET_SIZE(tuple) < 1) {
      PyErr_SetString(PyExc_TypeError, "call_encoder_blocks: layers must be a tuple, and not empty");
      return false;
    }
    EncoderBlockCall shared;
    if (!read_x(args, shared)) return false;
    layers.resize(static_cast<std::size_t>(PyTuple_GET_SIZE(tuple)));
    for (std::size_t i = 0; i < layers.size(); ++i) {
      PyObject* layer = PyTuple_GET_ITEM(tuple, static_cast<Py_ssize_t>(i));
      if (!PyTuple_CheckExact(layer) || PyTuple_GET_SIZE(layer) != kParts) {
        PyErr_Format(PyExc_TypeError, "call_encoder_blocks: a layer must be a tuple of %d",
                     static_cast<int>(kParts));
        return false;
      }
      PyObject* const* parts = PySequence_Fast_ITEMS(layer);
      layers[i].block = shared;
      if (!read_attention(parts, layers[i]) || !read_bias(args[kBias], parts[kBiasHead], layers[i]) ||
          !read_mlp(parts, layers[i].block))
        return false;
    }
    return true;
  }
  std::int64_t channels() const { return layers[0].block.hidden; }
  void write_to(void* y) {
    for (std::size_t i = 0; i < layers.size(); ++i) {
      EncoderBlockCall& block = layers[i].block;
      block.y = static_cast<float*>(y);
      if (i > 0) {
        block.x = block.y;
        block.x_stride = block.hidden;
      }
    }
  }
  void run() const {
    for (const Layer& layer : layers) encoder_block(layer.block);
  }

  dlpack::Tensor x;
  Firsts starts;
  std::vector<Layer> layers;

 private:
  bool read_x(PyObject* const* args, EncoderBlockCall& block) {
    return eager::read_states(args[kX], x, block) &&
           (PyTuple_CheckExact(args[kKeyMask])
                ? read_starts(args[kKeyMask], block)
                : eager::read_key_mask(args[kKeyMask], block.batch, block.tokens, block.key_mask,
                                       block.key_mask_stride)) &&
           eager::read_threads(args[kThreads], block.threads);
  }

  // In a mask's place: x is [1, rows, hidden], sequences one after the other.
  bool read_starts(PyObject* tuple, EncoderBlockCall& block) {
    if (!eager::read_firsts(tuple, starts) || block.batch != 1 || starts.back() != block.tokens) return false;
    block.batch = static_cast<std::int64_t>(starts.size()) - 1;
    block.starts = starts.data();
    return true;
  }

  static bool read_attention(PyObject* const* parts, Layer& layer) {
    EncoderBlockCall& block = layer.block;
    Firsts &keys = layer.keys, &values = layer.values;
    std::int64_t n = block.hidden;
    if (!eager::read_heads(parts[kKeyFirst], parts[kValueFirst], parts[kArithmetic], keys, values, block))
      return false;
    return eager::read_weight(parts + kQkv, 2 * keys.back() + values.back(), block.hidden, block.qkv) &&
           eager::read_index(parts[kOutIndex], block.out_index, n) &&
           eager::read_weight(parts + kO, n, values.back(), block.o) &&
           eager::to_float(parts[kScale], block.scale) && read_norm(parts + kNorm, block.hidden, block.norm);
  }

  // bias: fp32 [1, matrices, tokens, tokens], or None.
  static bool read_bias(PyObject* bias, PyObject* of_heads, Layer& layer) {
    EncoderBlockCall& block = layer.block;
    std::vector<std::int64_t>& bias_head = layer.bias_head;
    if (bias == Py_None) return of_heads == Py_None;
    dlpack::Tensor tensor;
    Element element;
    if (!eager::view_input(bias, tensor, element) || element != Element::fp32 || tensor.ndim != 4 ||
        tensor.shape[0] != 1 || tensor.shape[2] != block.tokens || tensor.shape[3] != block.tokens ||
        !eager::is_contiguous(tensor) || !PyTuple_CheckExact(of_heads) ||
        PyTuple_GET_SIZE(of_heads) != block.heads)
      return false;
    bias_head.resize(block.heads);
    for (std::int64_t h = 0; h < block.heads; ++h)
      if (!eager::to_int(PyTuple_GET_ITEM(of_heads, h), bias_head[h]) || bias_head[h] < 0 ||
          bias_head[h] >= tensor.shape[1])
        return false;
    block.bias = static_cast<const float*>(tensor.data);
    block.bias_head = bias_head.data();
    return true;
  }

  static bool read_mlp(PyObject* const* parts, EncoderBlockCall& block) {
    std::int64_t inner, n = block.hidden;
    return eager::to_int(parts[kInner], inner) &&
           eager::read_weight(parts + kUp, inner, block.hidden, block.up) &&
           eager::read_index(parts[kMlpOutIndex], block.mlp_out_index, n) &&
           eager::read_weight(parts + kDown, n, inner, block.down) &&
           eager::read_activation(parts[kActivation], block.activation) &&
           read_norm(parts + kMlpNorm, block.hidden, block.mlp_norm);
  }
};

}  // namespace

void add_encoder_block(pybind11::module_& m) {
  eager::add_call<EagerEncoderBlocks>(
      m,
      "call_encoder_blocks(x, key_mask or starts, bias, threads, layers) -> y, or None: an EncoderBlockCall "
      "of prunekern/encoder_block.h for each layer, one after the other. A layer: what prunekern/families "
      "makes for an encoder's step.");
}

}  // namespace prunekern
