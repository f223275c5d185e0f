// prunekern._C: decoder blocks one after the other, as an eager call only.
#include "prunekern/decoder_block.h"

#include <utility>
#include <vector>

#include "python/block_arguments.h"
#include "python/module.h"

namespace prunekern {
namespace {

enum Argument { kX, kCos, kSin, kCaches, kThreads, kLayers, kArgumentCount };

// What belongs to a layer, made once: a tuple.
enum Part {
  kNorm,
  kEps,
  kQkv,  // a weight is four: panels, bias, scale, activations
  kO = kQkv + 4,
  kOutIndex = kO + 4,
  kAngle,
  kKeyFirst,
  kValueFirst,
  kSharedBy,
  kScale,
  kMlpNorm,
  kMlpEps,
  kUp,
  kGate = kUp + 4,
  kDown = kGate + 4,
  kMlpOutIndex = kDown + 4,
  kHidden,
  kActivation,
  kParts
};

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

struct BlockFirsts {
  std::vector<std::int64_t> keys, values;
};

// Keys and values of one layer.
bool read_cache(PyObject* const* pair, AttentionBlockCall& call, std::int64_t& c, std::int64_t& d) {
  dlpack::Tensor keys, values;
  if (!view_cache(pair[0], keys, call.keys, call.k_batch_stride, call.k_stride) ||
      !view_cache(pair[1], values, call.values, call.v_batch_stride, call.v_stride))
    return false;
  call.past = keys.shape[2] - call.tokens;
  c = keys.shape[3];
  d = values.shape[3];
  return call.past >= 0 && keys.shape[0] == call.batch && values.shape[0] == call.batch &&
         values.shape[2] == keys.shape[2];
}

// Everything but x, its sizes, cos, sin and threads.
bool read_attention(PyObject* const* pair, PyObject* const* parts, AttentionBlockCall& call,
                    BlockFirsts& firsts) {
  std::int64_t c, d, n = call.hidden, pairs;
  if (!read_cache(pair, call, c, d) || !eager::to_int(parts[kSharedBy], call.shared_by) || call.shared_by < 1)
    return false;
  if (!eager::read_firsts(parts[kKeyFirst], c, firsts.keys) ||
      !eager::read_firsts(parts[kValueFirst], d, firsts.values) || firsts.keys.size() != firsts.values.size())
    return false;
  call.heads = static_cast<std::int64_t>(firsts.keys.size()) - 1;
  call.qk_first = firsts.keys.data();
  call.v_first = firsts.values.data();
  return eager::read_index(parts[kOutIndex], call.out_index, n) &&
         eager::view_vector(parts[kNorm], call.hidden, call.norm) && eager::to_float(parts[kEps], call.eps) &&
         eager::read_weight(parts + kQkv, (call.shared_by + 1) * c + d, call.hidden, call.qkv) &&
         eager::read_weight(parts + kO, n, call.shared_by * d, call.o) &&
         eager::view_index(parts[kAngle], call.angle, pairs) && pairs == c / 2 &&
         eager::to_float(parts[kScale], call.scale);
}

bool read_mlp(PyObject* const* parts, DecoderBlockCall& call) {
  const std::int64_t width = call.attention.hidden;
  std::int64_t hidden, n = width;
  return eager::read_index(parts[kMlpOutIndex], call.out_index, n) && eager::to_int(parts[kHidden], hidden) &&
         eager::read_activation(parts[kActivation], call.activation) &&
         eager::view_vector(parts[kMlpNorm], width, call.norm) && eager::to_float(parts[kMlpEps], call.eps) &&
         eager::read_weight(parts + kUp, hidden, width, call.up) &&
         eager::read_weight(parts + kGate, hidden, width, call.gate) &&
         eager::read_weight(parts + kDown, n, hidden, call.down);
}

struct EagerDecoderBlocks {
  static constexpr const char* kName = "call_decoder_blocks";
  static constexpr int kArguments = kArgumentCount;

  bool read(PyObject* const* args) {
    PyObject *caches = args[kCaches], *layers = args[kLayers];
    if (!PyTuple_CheckExact(caches) || !PyTuple_CheckExact(layers) || PyTuple_GET_SIZE(layers) < 1 ||
        PyTuple_GET_SIZE(caches) != 2 * PyTuple_GET_SIZE(layers)) {
      PyErr_SetString(PyExc_TypeError,
                      "call_decoder_blocks: layers must be a tuple, and caches one of twice as many");
      return false;
    }
    DecoderBlockCall shared;
    if (!read_shared(args, shared.attention)) return false;
    const auto count = static_cast<std::size_t>(PyTuple_GET_SIZE(layers));
    blocks.assign(count, shared);
    if (firsts.size() < count) firsts.resize(count);
    for (std::size_t i = 0; i < count; ++i) {
      PyObject* layer = PyTuple_GET_ITEM(layers, static_cast<Py_ssize_t>(i));
      if (!PyTuple_CheckExact(layer) || PyTuple_GET_SIZE(layer) != kParts) {
        PyErr_Format(PyExc_TypeError, "call_decoder_blocks: a layer must be a tuple of %d",
                     static_cast<int>(kParts));
        return false;
      }
      PyObject* const* parts = PySequence_Fast_ITEMS(layer);
      if (!read_attention(PySequence_Fast_ITEMS(caches) + 2 * i, parts, blocks[i].attention, firsts[i]) ||
          !read_mlp(parts, blocks[i]))
        return false;
    }
    return true;
  }
  std::int64_t channels() const { return blocks[0].attention.hidden; }
  // The first block reads x, and every other one y, in place.
  void write_to(void* y) {
    for (DecoderBlockCall& block : blocks) {
      block.attention.y = static_cast<float*>(y);
      if (&block == blocks.data()) continue;
      block.attention.x = block.attention.y;
      block.attention.x_stride = block.attention.hidden;
    }
  }
  void run() const {
    for (const DecoderBlockCall& block : blocks) decoder_block(block);
  }

  dlpack::Tensor x;
  // What they allocated is kept from call to call: taken for this one, so that a call within a call has its
  // own.
  std::vector<BlockFirsts> firsts = std::move(kept_firsts());
  std::vector<DecoderBlockCall> blocks = std::move(kept_blocks());
  EagerDecoderBlocks() = default;
  EagerDecoderBlocks(const EagerDecoderBlocks&) = delete;
  ~EagerDecoderBlocks() {
    kept_firsts() = std::move(firsts);
    kept_blocks() = std::move(blocks);
  }

 private:
  bool read_shared(PyObject* const* args, AttentionBlockCall& call) {
    Element element;
    if (!eager::view_input(args[kX], x, element) || element != Element::fp32 || x.ndim != 3) return false;
    call.batch = x.shape[0];
    call.tokens = x.shape[1];
    call.hidden = x.shape[2];
    const std::int64_t rows = call.batch * call.tokens;
    if (rows * call.hidden == 0 || !eager::rows(x, rows, call.x_stride)) return false;
    call.x = static_cast<const float*>(x.data);
    return eager::read_tables(args[kCos], args[kSin], call) &&
           eager::read_threads(args[kThreads], call.threads);
  }
  static std::vector<BlockFirsts>& kept_firsts() {
    static thread_local std::vector<BlockFirsts> kept;
    return kept;
  }
  static std::vector<DecoderBlockCall>& kept_blocks() {
    static thread_local std::vector<DecoderBlockCall> kept;
    return kept;
  }
};

}  // namespace

void add_decoder_block(pybind11::module_& m) {
  eager::add_call<EagerDecoderBlocks>(
      m,
      "call_decoder_blocks(x, cos, sin, caches, threads, layers) -> y, or None, and then nothing is written: "
      "DecoderBlockCall of prunekern/decoder_block.h, one block after the other. caches: (keys, values, ...) "
      "of each block, [batch, 1, past + tokens, channels], the last tokens are written. layers: for each "
      "block what prunekern/families makes for a decoder's step.");
}

}  // namespace prunekern
