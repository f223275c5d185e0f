// What the eager calls of whole blocks read alike. false: not ordinary, or a Python error is set.
#pragma once

#include "python/addresses.h"
#include "python/eager.h"

namespace prunekern::eager {

// A weight is four of a layer's parts: panels, bias, scale, activations.
inline bool read_weight(PyObject* const* parts, std::int64_t n, std::int64_t k, Packed& weight) {
  return read_weight(parts[0], parts[2], parts[1], parts[3], n, k, weight);
}

// x: fp32 [batch, tokens, hidden], none of them 0.
template <class Block>
bool read_states(PyObject* arg, dlpack::Tensor& x, Block& block) {
  Element element;
  if (!view_input(arg, x, element) || element != Element::fp32 || x.ndim != 3) return false;
  block.batch = x.shape[0];
  block.tokens = x.shape[1];
  block.hidden = x.shape[2];
  block.x = static_cast<const float*>(x.data);
  const std::int64_t rows = block.batch * block.tokens;
  return rows * block.hidden > 0 && prunekern::eager::rows(x, rows, block.x_stride);
}

// Where heads begin among query (and key) channels and among values, of which there are some.
template <class Block>
bool read_heads(PyObject* key_first, PyObject* value_first, PyObject* arithmetic, Firsts& keys,
                Firsts& values, Block& block) {
  std::int64_t number;
  if (!read_firsts(key_first, keys) || !read_firsts(value_first, values) || keys.size() != values.size() ||
      values.back() == 0 || !to_int(arithmetic, number) || number < 0 ||
      number > static_cast<int>(Arithmetic::int8))
    return false;
  block.heads = static_cast<std::int64_t>(keys.size()) - 1;
  block.qk_first = keys.data();
  block.v_first = values.data();
  block.arithmetic = static_cast<Arithmetic>(number);
  return true;
}

}  // namespace prunekern::eager
