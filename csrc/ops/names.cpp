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
  if (text == "quick_gelu") return Activation::quick_gelu;
  throw std::invalid_argument("activation must be none, relu, gelu, gelu_tanh, silu or quick_gelu (got " +
                              text + ")");
}

const char* name(Activations activations) {
  switch (activations) {
    case Activations::floating:
      return "float";
    case Activations::int8:
      return "int8";
    default:
      return "auto";
  }
}

Activations parse_activations(const std::string& text) {
  for (Activations one : {Activations::automatic, Activations::floating, Activations::int8})
    if (text == name(one)) return one;
  throw std::invalid_argument("activations must be auto, float or int8 (got " + text + ")");
}

const char* name(Arithmetic arithmetic) {
  switch (arithmetic) {
    case Arithmetic::bf16:
      return "bf16";
    case Arithmetic::int8:
      return "int8";
    default:
      return "fp32";
  }
}

Arithmetic parse_arithmetic(const std::string& text) {
  for (Arithmetic one : {Arithmetic::fp32, Arithmetic::bf16, Arithmetic::int8})
    if (text == name(one)) return one;
  throw std::invalid_argument("arithmetic must be fp32, bf16 or int8 (got " + text + ")");
}

const char* name(WeightType type) {
  switch (type) {
    case WeightType::bf16:
      return "bf16";
    case WeightType::int8:
      return "int8";
    case WeightType::int4:
      return "int4";
    default:
      return "fp32";
  }
}

}  // namespace prunekern
