// What people call activations and kinds of weights.
#include <stdexcept>

#include "prunekern/linear.h"

namespace prunekern {

Activation parse_activation(const std::string& text) {
  if (text == "none") return Activation::none;
  if (text == "relu") return Activation::relu;
  if (text == "gelu") return Activation::gelu;
  if (text == "gelu_tanh") return Activation::gelu_tanh;
  if (text == "silu") return Activation::silu;
  throw std::invalid_argument("activation must be none, relu, gelu, gelu_tanh or silu (got " + text + ")");
}

const char* name(WeightType type) {
  switch (type) {
    case WeightType::bf16:
      return "bf16";
    case WeightType::int8:
      return "int8";
    default:
      return "fp32";
  }
}

}  // namespace prunekern
