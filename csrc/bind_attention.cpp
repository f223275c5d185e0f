// prunekern._C: compact_attention.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "bind.h"
#include "prunekern/attention.h"

namespace py = pybind11;

namespace prunekern {
namespace {

using Strides = std::pair<std::int64_t, std::int64_t>;  // of a sequence, of a token
using Firsts = std::vector<std::int64_t>;

void attention(std::int64_t batch, std::int64_t queries, std::int64_t keys, const Firsts& qk_first,
               const Firsts& v_first, Address q, Strides q_strides, Address k, Strides k_strides, Address v,
               Strides v_strides, Address y, Strides y_strides, Address key_mask,
               std::int64_t key_mask_stride, float scale, int threads) {
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
  py::gil_scoped_release release;
  compact_attention(call);
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("compact_attention", &attention,
        "(batch, queries, keys, qk_first, v_first, q, q_strides, k, k_strides, v, v_strides, y, y_strides, "
        "key_mask, key_mask_stride, scale, threads): AttentionCall of prunekern/attention.h; strides are "
        "(of a sequence, of a token), addresses integers, key_mask 0 where every key may be read.");
}

}  // namespace prunekern
