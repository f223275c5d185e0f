#include "ops/check_index.h"

#include <stdexcept>
#include <string>

namespace prunekern {

void check_index(const char* op, const char* name, const std::int64_t* index, std::int64_t count,
                 std::int64_t size) {
  // Strictly ascending, so only the ends need a bound; the loop has no exit and vectorises.
  bool ascending = true;
  for (std::int64_t i = 1; i < count; ++i) ascending &= index[i - 1] < index[i];
  if (count == 0 || (ascending && index[0] >= 0 && index[count - 1] < size)) return;
  std::int64_t at = 0;
  while (index[at] >= 0 && index[at] < size && (at == 0 || index[at - 1] < index[at])) ++at;
  throw std::invalid_argument(std::string(op) + ": " + name + " must be sorted and < " +
                              std::to_string(size) + " (got " + std::to_string(index[at]) + " at position " +
                              std::to_string(at) + ")");
}

}  // namespace prunekern
