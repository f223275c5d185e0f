// prunekern._C: disentangled_attention, as an eager call only.
#include "prunekern/disentangled_attention.h"

#include "python/addresses.h"
#include "python/eager.h"
#include "python/module.h"

namespace prunekern {
namespace {

struct EagerDisentangled {
  static constexpr const char* kName = "call_disentangled";
  enum Argument {
    kQ,
    kK,
    kV,
    kKeyFirst,
    kValueFirst,
    kPosKey,
    kPosQuery,
    kMask,
    kScale,
    kThreads,
    kArithmetic,
    kArguments
  };

  bool read(PyObject* const* args) {
    dlpack::Tensor k, v;
    if (!eager::view_tokens(args[kQ], x, attention.q, attention.q_batch_stride, attention.q_stride) ||
        !eager::view_tokens(args[kK], k, attention.k, attention.k_batch_stride, attention.k_stride) ||
        !eager::view_tokens(args[kV], v, attention.v, attention.v_batch_stride, attention.v_stride))
      return false;
    attention.batch = x.shape[0];
    attention.tokens = x.shape[1];
    for (const dlpack::Tensor* one : {&k, &v})
      if (one->shape[0] != attention.batch || one->shape[1] != attention.tokens) return false;
    if (k.shape[2] != x.shape[2] || !eager::read_firsts(args[kKeyFirst], k.shape[2], qk_first) ||
        !eager::read_firsts(args[kValueFirst], v.shape[2], v_first))
      return false;
    if (qk_first.size() != v_first.size() || attention.batch * attention.tokens * v_first.back() == 0)
      return false;
    attention.heads = static_cast<std::int64_t>(qk_first.size()) - 1;
    attention.qk_first = qk_first.data();
    attention.v_first = v_first.data();
    std::int64_t arithmetic;
    if (!eager::to_int(args[kArithmetic], arithmetic) || arithmetic < 0 ||
        arithmetic > static_cast<int>(Arithmetic::int8))
      return false;
    attention.arithmetic = static_cast<Arithmetic>(arithmetic);
    return read_positions(args[kPosKey], attention.pos_key, attention.pos_key_stride) &&
           read_positions(args[kPosQuery], attention.pos_query, attention.pos_query_stride) &&
           eager::read_key_mask(args[kMask], attention.batch, attention.tokens, attention.token_mask,
                                attention.token_mask_stride) &&
           eager::to_float(args[kScale], attention.scale) &&
           eager::read_threads(args[kThreads], attention.threads);
  }
  std::int64_t channels() const { return v_first.back(); }
  void write_to(void* y) {
    attention.y = static_cast<float*>(y);
    attention.y_stride = channels();
    attention.y_batch_stride = attention.tokens * attention.y_stride;
  }
  void run() const { disentangled_attention(attention); }

  dlpack::Tensor x;
  Firsts qk_first, v_first;
  DisentangledCall attention;

 private:
  // [2 tokens - 1, channels], or None: null.
  bool read_positions(PyObject* object, const float*& data, std::int64_t& stride) const {
    if (object == Py_None) return true;
    dlpack::Tensor tensor;
    Element element;
    const std::int64_t count = 2 * attention.tokens - 1, width = qk_first.back();
    if (!eager::view_input(object, tensor, element) || element != Element::fp32 || tensor.ndim != 2 ||
        tensor.shape[0] != count || tensor.shape[1] != width)
      return false;
    if (width > 0) data = static_cast<const float*>(tensor.data);  // without channels they add nothing
    return width == 0 || eager::rows(tensor, count, stride);
  }
};

}  // namespace

void add_disentangled_attention(pybind11::module_& m) {
  eager::add_call<EagerDisentangled>(
      m,
      "call_disentangled(q, k, v, qk_first, v_first, pos_key, pos_query, token_mask, scale, threads, "
      "arithmetic) -> y, or None: DisentangledCall of prunekern/disentangled_attention.h.");
}

}  // namespace prunekern
