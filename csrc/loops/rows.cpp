#include "loops/rows.h"

#include <algorithm>

#include "loops/panels.h"

namespace prunekern {

void make_reads(const Kernels& kernels, const std::int64_t* in_index, std::int64_t k,
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

Rows take_rows(const Input& input, const Kernels& kernels, Range rows, Scratch& scratch) {
  const char* x =
      static_cast<const char*>(input.x) + rows.begin * input.stride * element_bytes(input.element);
  // Rows a whole number of pages apart would fall into one set of the L1 cache: 14 of them do not fit 12
  // ways.
  const bool aliased = input.stride * 4 % 4096 == 0 && rows.size() > 4;
  if (input.reads == nullptr && input.element == Element::fp32 && !aliased)
    return {reinterpret_cast<const float*>(x), input.stride};
  // An odd number of lines from row to row, and room for the whole vector that is written last.
  const std::int64_t stride = round_up(input.k + kernels.vector, 32) + 16;
  float* copy = scratch.get<float>(rows.size() * stride);
  if (input.k == 0) return {copy, stride};
  TakeArgs args{};
  args.x = x;
  args.x_stride = input.stride;
  args.rows = rows.size();
  args.columns = input.reads == nullptr ? input.k : input.in_features;
  if (input.reads != nullptr) {
    args.reads = input.reads->data();
    args.n_reads = static_cast<std::int64_t>(input.reads->size());
  }
  args.to = copy;
  args.to_stride = stride;
  kernels.take[static_cast<int>(input.element)](args);
  return {copy, stride};
}

}  // namespace prunekern
