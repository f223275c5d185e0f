#include "loops/windows.h"

#include <algorithm>

namespace prunekern {

void make_windows(const Kernels& kernels, const std::int64_t* out_index, std::int64_t n, std::int64_t n_out,
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

}  // namespace prunekern
