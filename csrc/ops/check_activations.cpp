#include "ops/check_activations.h"

#include <stdexcept>
#include <string>

namespace prunekern {

void check_activations(const char* op, const Packed& weight) {
  if (weight.activations != Activations::int8) return;
  const bool is_int8 = weight.type == WeightType::int8;
  if (!is_int8 && weight.type != WeightType::int4 && weight.data != nullptr)
    throw std::invalid_argument(std::string(op) + ": activations int8 go with an int8 or int4 weight (got " +
                                name(weight.type) + ")");
  if (is_int8 && weight.k > kMostInt8Inputs)
    throw std::invalid_argument(std::string(op) + ": activations int8 go with at most " +
                                std::to_string(kMostInt8Inputs) + " inputs (got " + std::to_string(weight.k) +
                                ")");
}

}  // namespace prunekern
