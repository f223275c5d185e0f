// prunekern._C: compact_attention, rotate_pairs and rms_norm.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "bind.h"
#include "prunekern/attention.h"
#include "prunekern/norm.h"
#include "prunekern/rotary.h"

namespace py = pybind11;

namespace prunekern {
namespace {

using Strides = std::pair<std::int64_t, std::int64_t>;  // of a sequence, of a token
using Firsts = std::vector<std::int64_t>;

void attention(std::int64_t batch, std::int64_t queries, std::int64_t keys, const Firsts& qk_first,
               const Firsts& v_first, Address q, Strides q_strides, Address k, Strides k_strides, Address v,
               Strides v_strides, Address y, Strides y_strides, Address key_mask,
               std::int64_t key_mask_stride, float scale, int threads, std::int64_t shared_by, bool causal) {
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
  call.causal = causal;
  py::gil_scoped_release release;
  compact_attention(call);
}

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

void norm(std::int64_t rows, std::int64_t n, Address x, std::int64_t x_stride, Address weight, float eps,
          Address y, int threads) {
  py::gil_scoped_release release;
  rms_norm({rows, n, at<const float>(x), x_stride, at<const float>(weight), eps, at<float>(y), threads});
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("compact_attention", &attention,
        "(batch, queries, keys, qk_first, v_first, q, q_strides, k, k_strides, v, v_strides, y, y_strides, "
        "key_mask, key_mask_stride, scale, threads, shared_by, causal): AttentionCall of "
        "prunekern/attention.h; strides are "
        "(of a sequence, of a token), addresses integers, key_mask 0 where every key may be read.");
  m.def(
      "rotate_pairs", &rotary,
      "(batch, tokens, first, shared_by, x, x_strides, cos, cos_strides, sin, sin_strides, angles, angle, y, "
      "threads): RotaryCall of prunekern/rotary.h; strides are (of a sequence, of a token).");
  m.def("rms_norm", &norm, "(rows, n, x, x_stride, weight, eps, y, threads): NormCall of prunekern/norm.h.");
}

}  // namespace prunekern
