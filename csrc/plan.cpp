#include "plan.h"

#include <algorithm>
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

void plan_windows(const Kernels& kernels, const std::int64_t* out_index, std::int64_t n, std::int64_t n_out,
                  Windows& windows) {
  const std::int64_t width = kernels.width, vector = kernels.vector;
  windows.all.clear();
  windows.first.assign(1, 0);
  for (std::int64_t channel = 0; channel < n; channel += width) {
    const std::int64_t last = std::min(channel + width, n);
    const bool is_last = last == n;
    const std::int64_t begin = out_index == nullptr ? channel : (channel == 0 ? 0 : out_index[channel]);
    const std::int64_t end = is_last ? n_out : (out_index == nullptr ? last : out_index[last]);
    std::int64_t next = channel;  // the next channel to place
    for (std::int64_t column = begin; column < end; column += vector) {
      Window window;
      window.column = column;
      window.width = static_cast<std::int32_t>(std::min(vector, end - column));
      window.source = static_cast<std::int32_t>(next - channel);
      if (out_index == nullptr) {
        window.mask = (1u << window.width) - 1;
        next += window.width;
      } else {
        window.mask = 0;
        for (; next < last && out_index[next] < column + window.width; ++next)
          window.mask |= 1u << (out_index[next] - column);
      }
      windows.all.push_back(window);
    }
    windows.first.push_back(static_cast<std::int64_t>(windows.all.size()));
  }
}

void plan_reads(const Kernels& kernels, const std::int64_t* in_index, std::int64_t k,
                std::int64_t in_features, Reads& reads) {
  const std::int64_t last = std::max<std::int64_t>(in_features - kernels.vector, 0);  // nothing past the row
  reads.clear();
  for (std::int64_t i = 0; i < k;) {
    Read read{std::min(in_index[i], last), static_cast<std::int32_t>(i), 0};
    for (; i < k && in_index[i] < read.column + kernels.vector; ++i)
      read.mask |= 1u << (in_index[i] - read.column);
    reads.push_back(read);
  }
}

}  // namespace prunekern
