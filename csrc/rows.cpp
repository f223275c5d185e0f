#include "rows.h"

#include "packed.h"

namespace prunekern {

Rows take_rows(const LinearCall& call, const Kernels& kernels, const Reads& reads, Range rows,
               Scratch& scratch) {
  const char* x = static_cast<const char*>(call.x) + rows.begin * call.x_stride * element_bytes(call.element);
  // Rows a whole number of pages apart would fall into one set of the L1 cache: 14 of them do not fit 12
  // ways.
  const bool aliased = call.x_stride * 4 % 4096 == 0 && rows.size() > 4;
  if (call.in_index == nullptr && call.element == Element::fp32 && !aliased)
    return {reinterpret_cast<const float*>(x), call.x_stride};
  // An odd number of lines from row to row, and room for the whole vector that is written last.
  const std::int64_t stride = round_up(call.weight.k + kernels.vector, 32) + 16;
  float* copy = scratch.get<float>(rows.size() * stride);
  TakeArgs args{};
  args.x = x;
  args.x_stride = call.x_stride;
  args.rows = rows.size();
  args.columns = call.in_index == nullptr ? call.weight.k : call.in_features;
  args.reads = call.in_index == nullptr ? nullptr : reads.data();
  args.n_reads = static_cast<std::int64_t>(reads.size());
  args.to = copy;
  args.to_stride = stride;
  kernels.take[static_cast<int>(call.element)](args);
  return {copy, stride};
}

}  // namespace prunekern
