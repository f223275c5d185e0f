// prunekern._C: compact_attention. As an eager call 3 us where the questions asked in Python take 20, against
// 400 us for twelve heads of 128 tokens.
#include "prunekern/attention.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>

#include "python/addresses.h"
#include "python/eager.h"
#include "python/module.h"

namespace py = pybind11;

namespace prunekern {
namespace {

void attention(std::int64_t batch, std::int64_t queries, std::int64_t keys, const Firsts& qk_first,
               const Firsts& v_first, Address q, Strides q_strides, Address k, Strides k_strides, Address v,
               Strides v_strides, Address y, Strides y_strides, Address key_mask,
               std::int64_t key_mask_stride, float scale, int threads, std::int64_t shared_by, bool causal,
               const std::string& arithmetic, std::int64_t window) {
  if (qk_first.empty() || qk_first.size() != v_first.size())
    throw std::invalid_argument("compact_attention: qk_first and v_first must have heads + 1 entries");
  AttentionCall call;
  call.batch = batch;
  call.queries = queries;
  call.keys = keys;
  call.heads = static_cast<std::int64_t>(qk_first.size()) - 1;
  call.qk_first = qk_first.data();
  call.v_first = v_first.data();
  call.q = at<const float>(q);
  call.k = at<const float>(k);
  call.v = at<const float>(v);
  call.y = at<float>(y);
  std::tie(call.q_batch_stride, call.q_stride) = q_strides;
  std::tie(call.k_batch_stride, call.k_stride) = k_strides;
  std::tie(call.v_batch_stride, call.v_stride) = v_strides;
  std::tie(call.y_batch_stride, call.y_stride) = y_strides;
  call.key_mask = at<const bool>(key_mask);
  call.key_mask_stride = key_mask_stride;
  call.scale = scale;
  call.threads = threads;
  call.shared_by = shared_by;
  call.arithmetic = parse_arithmetic(arithmetic);
  call.causal = causal;
  call.window = window;
  py::gil_scoped_release release;
  compact_attention(call);
}

struct EagerAttention {
  static constexpr const char* kName = "call_attention";
  enum Argument {
    kQ,
    kK,
    kV,
    kKeyFirst,
    kValueFirst,
    kMask,
    kScale,
    kSharedBy,
    kCausal,
    kThreads,
    kArithmetic,
    kWindow,
    kArguments
  };

  bool read(PyObject* const* args) {
    dlpack::Tensor k, v;
    if (!eager::view_tokens(args[kQ], x, attention.q, attention.q_batch_stride, attention.q_stride) ||
        !eager::view_tokens(args[kK], k, attention.k, attention.k_batch_stride, attention.k_stride) ||
        !eager::view_tokens(args[kV], v, attention.v, attention.v_batch_stride, attention.v_stride))
      return false;
    attention.batch = x.shape[0];
    attention.queries = x.shape[1];
    attention.keys = k.shape[1];
    if (!eager::to_int(args[kSharedBy], attention.shared_by) || attention.shared_by < 1 ||
        !PyBool_Check(args[kCausal]))
      return false;
    attention.causal = args[kCausal] == Py_True;
    if (k.shape[0] != attention.batch || attention.shared_by * k.shape[2] != x.shape[2]) return false;
    if (attention.causal && attention.queries > attention.keys) return false;
    if (v.shape[0] != attention.batch || v.shape[1] != attention.keys) return false;
    if (!eager::read_firsts(args[kKeyFirst], k.shape[2], qk_first) ||
        !eager::read_firsts(args[kValueFirst], v.shape[2], v_first))
      return false;
    if (qk_first.size() != v_first.size() || attention.batch * attention.queries * v_first.back() == 0)
      return false;
    attention.heads = static_cast<std::int64_t>(qk_first.size()) - 1;
    attention.qk_first = qk_first.data();
    attention.v_first = v_first.data();
    std::int64_t arithmetic;
    if (!eager::to_int(args[kArithmetic], arithmetic) || arithmetic < 0 ||
        arithmetic > static_cast<int>(Arithmetic::int8))
      return false;
    attention.arithmetic = static_cast<Arithmetic>(arithmetic);
    if (!eager::to_int(args[kWindow], attention.window)) return false;
    if (attention.window >= 0 && (attention.causal || attention.queries != attention.keys)) return false;
    return eager::read_key_mask(args[kMask], attention.batch, attention.keys, attention.key_mask,
                                attention.key_mask_stride) &&
           eager::to_float(args[kScale], attention.scale) &&
           eager::read_threads(args[kThreads], attention.threads);
  }
  std::int64_t channels() const { return attention.shared_by * v_first.back(); }
  void write_to(void* y) {
    attention.y = static_cast<float*>(y);
    attention.y_stride = channels();
    attention.y_batch_stride = attention.queries * attention.y_stride;
  }
  void run() const { compact_attention(attention); }

  dlpack::Tensor x;
  Firsts qk_first, v_first;
  AttentionCall attention;
};

}  // namespace

void add_attention(py::module_& m) {
  using py::arg;
  m.def("compact_attention", &attention, arg("batch"), arg("queries"), arg("keys"), arg("qk_first"),
        arg("v_first"), arg("q"), arg("q_strides"), arg("k"), arg("k_strides"), arg("v"), arg("v_strides"),
        arg("y"), arg("y_strides"), arg("key_mask"), arg("key_mask_stride"), arg("scale"), arg("threads"),
        arg("shared_by"), arg("causal"), arg("arithmetic") = "fp32", arg("window") = -1,
        "AttentionCall of prunekern/attention.h; strides are (of a sequence, of a token), key_mask 0 where "
        "every "
        "key may be read, window negative where all keys are near enough.");
  eager::add_call<EagerAttention>(m,
                                  "call_attention(q, k, v, qk_first, v_first, key_mask, scale, shared_by, "
                                  "causal, threads, arithmetic, window) -> y, or None: "
                                  "the same for compact_attention.");
}

}  // namespace prunekern
