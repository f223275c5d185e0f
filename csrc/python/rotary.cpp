// prunekern._C: rotate_pairs.
#include "prunekern/rotary.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <tuple>

#include "python/addresses.h"
#include "python/eager.h"
#include "python/module.h"

namespace py = pybind11;

namespace prunekern {
namespace {

void rotary(std::int64_t batch, std::int64_t tokens, const Firsts& first, std::int64_t shared_by, Address x,
            Strides x_strides, Address cos, Strides cos_strides, Address sin, Strides sin_strides,
            std::int64_t angles, Address angle, Address y, int threads) {
  if (first.empty()) throw std::invalid_argument("rotate_pairs: first must have heads + 1 entries");
  RotaryCall call;
  call.batch = batch;
  call.tokens = tokens;
  call.heads = static_cast<std::int64_t>(first.size()) - 1;
  call.first = first.data();
  call.shared_by = shared_by;
  call.x = at<const float>(x);
  call.cos = at<const float>(cos);
  call.sin = at<const float>(sin);
  call.angle = at<const std::int64_t>(angle);
  call.angles = angles;
  call.y = at<float>(y);
  call.y_stride = shared_by * first.back();
  call.y_batch_stride = tokens * call.y_stride;
  std::tie(call.x_batch_stride, call.x_stride) = x_strides;
  std::tie(call.cos_batch_stride, call.cos_stride) = cos_strides;
  std::tie(call.sin_batch_stride, call.sin_stride) = sin_strides;
  call.threads = threads;
  py::gil_scoped_release release;
  rotate_pairs(call);
}

struct EagerRotary {
  static constexpr const char* kName = "call_rotary";
  enum Argument { kX, kCos, kSin, kAngle, kFirst, kSharedBy, kThreads, kArguments };

  bool read(PyObject* const* args) {
    std::int64_t pairs;
    if (!eager::to_int(args[kSharedBy], rotary.shared_by) || rotary.shared_by < 1) return false;
    if (!eager::view_tokens(args[kX], x, rotary.x, rotary.x_batch_stride, rotary.x_stride)) return false;
    rotary.batch = x.shape[0];
    rotary.tokens = x.shape[1];
    if (!eager::read_tables(args[kCos], args[kSin], rotary) ||
        !eager::view_index(args[kAngle], rotary.angle, pairs) ||
        !eager::read_firsts(args[kFirst], x.shape[2] / rotary.shared_by, first))
      return false;
    rotary.heads = static_cast<std::int64_t>(first.size()) - 1;
    rotary.first = first.data();
    if (x.shape[2] != rotary.shared_by * first.back() || 2 * pairs != first.back()) return false;
    return rotary.batch * rotary.tokens * x.shape[2] > 0 &&
           eager::read_threads(args[kThreads], rotary.threads);
  }
  std::int64_t channels() const { return x.shape[2]; }
  void write_to(void* y) {
    rotary.y = static_cast<float*>(y);
    rotary.y_stride = channels();
    rotary.y_batch_stride = rotary.tokens * rotary.y_stride;
  }
  void run() const { rotate_pairs(rotary); }

  dlpack::Tensor x;
  Firsts first;
  RotaryCall rotary;
};

}  // namespace

void add_rotary(py::module_& m) {
  using py::arg;
  m.def("rotate_pairs", &rotary, arg("batch"), arg("tokens"), arg("first"), arg("shared_by"), arg("x"),
        arg("x_strides"), arg("cos"), arg("cos_strides"), arg("sin"), arg("sin_strides"), arg("angles"),
        arg("angle"), arg("y"), arg("threads"),
        "RotaryCall of prunekern/rotary.h; strides are (of a sequence, of a token).");
  eager::add_call<EagerRotary>(
      m,
      "call_rotary(x, cos, sin, angle, first, shared_by, threads) -> y, or None: the same for rotate_pairs.");
}

}  // namespace prunekern
