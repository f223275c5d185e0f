// prunekern._C: decoder_block, as an eager call only.
#include "prunekern/decoder_block.h"

#include <vector>

#include "python/eager.h"
#include "python/module.h"

namespace prunekern {
namespace {

enum Argument { kX, kCos, kSin, kKeys, kValues, kThreads, kLayer, kArgumentCount };

// What belongs to the layer, made once: a tuple.
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

bool read_weight(PyObject* const* parts, std::int64_t n, std::int64_t k, Packed& weight) {
  return eager::read_weight(parts[0], parts[2], parts[1], parts[3], n, k, weight);
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

struct BlockFirsts {
  std::vector<std::int64_t> keys, values;
};

bool read_attention(PyObject* const* args, PyObject* const* parts, AttentionBlockCall& call,
                    dlpack::Tensor& x, BlockFirsts& firsts) {
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
  std::int64_t pairs;
  return eager::read_index(parts[kOutIndex], call.out_index, n) &&
         eager::view_vector(parts[kNorm], call.hidden, call.norm) && eager::to_float(parts[kEps], call.eps) &&
         read_weight(parts + kQkv, made, call.hidden, call.qkv) &&
         read_weight(parts + kO, n, call.shared_by * d, call.o) &&
         eager::read_tables(args[kCos], args[kSin], call) &&
         eager::view_index(parts[kAngle], call.angle, pairs) && pairs == c / 2 &&
         eager::to_float(parts[kScale], call.scale) && eager::read_threads(args[kThreads], call.threads);
}

bool read_mlp(PyObject* const* parts, DecoderBlockCall& call) {
  const std::int64_t width = call.attention.hidden;
  std::int64_t hidden, n = width;
  return eager::read_index(parts[kMlpOutIndex], call.out_index, n) && eager::to_int(parts[kHidden], hidden) &&
         eager::read_activation(parts[kActivation], call.activation) &&
         eager::view_vector(parts[kMlpNorm], width, call.norm) && eager::to_float(parts[kMlpEps], call.eps) &&
         read_weight(parts + kUp, hidden, width, call.up) &&
         read_weight(parts + kGate, hidden, width, call.gate) &&
         read_weight(parts + kDown, n, hidden, call.down);
}

struct EagerDecoderBlock {
  static constexpr const char* kName = "call_decoder_block";
  static constexpr int kArguments = kArgumentCount;

  bool read(PyObject* const* args) {
    if (!PyTuple_CheckExact(args[kLayer]) || PyTuple_GET_SIZE(args[kLayer]) != kParts) {
      PyErr_Format(PyExc_TypeError, "call_decoder_block: layer must be a tuple of %d",
                   static_cast<int>(kParts));
      return false;
    }
    PyObject* const* parts = PySequence_Fast_ITEMS(args[kLayer]);
    return read_attention(args, parts, block.attention, x, firsts) && read_mlp(parts, block);
  }
  std::int64_t channels() const { return block.attention.hidden; }
  void write_to(void* y) { block.attention.y = static_cast<float*>(y); }
  void run() const { decoder_block(block); }

  dlpack::Tensor x;
  BlockFirsts firsts;
  DecoderBlockCall block;
};

}  // namespace

void add_decoder_block(pybind11::module_& m) {
  eager::add_call<EagerDecoderBlock>(
      m,
      "call_decoder_block(x, cos, sin, keys, values, threads, layer) -> y, or None, and then nothing is "
      "written: DecoderBlockCall of prunekern/decoder_block.h. keys, values: [batch, 1, past + tokens, "
      "channels], the last tokens are written. layer: what prunekern/families makes for a decoder's step.");
}

}  // namespace prunekern
