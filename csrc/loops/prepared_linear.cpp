// Blocks of prepared rows, each through all panels of this thread.
#include "loops/linear.h"
#include "loops/panels.h"
#include "loops/prepared.h"

namespace prunekern {

void prepared_linear(const Product& product, const Linear& linear, Range rows, Range panels) {
  static thread_local PreparedScratch scratch;
  static thread_local LayerScratch layer_scratch;
  const Session session(product);
  const LinearCall& call = linear.call;
  const std::int64_t element = element_bytes(call.element);
  const Layer layer = make_layer(call.weight, linear.kernels.width, call.activation, layer_scratch);
  const std::int64_t blocks = ceil_div(rows.size(), block_rows(product, call.weight.k));
  for (std::int64_t b = 0; b < blocks; ++b) {
    const Range block = share_groups(rows, group_rows(product), b, blocks);
    Target target;
    target.windows = &linear.windows;
    target.element = call.element;
    target.y = static_cast<char*>(call.y) + block.begin * call.y_stride * element;
    target.y_stride = call.y_stride;
    if (call.residual != nullptr)
      target.residual =
          static_cast<const char*>(call.residual) + block.begin * call.residual_stride * element;
    target.residual_stride = call.residual_stride;
    const PreparedRows x = prepare_rows(product, linear.kernels, linear.input(), block, scratch);
    multiply_panels(product, linear.kernels.width, x, layer, nullptr, panels, target, b + 1 < blocks);
  }
}

}  // namespace prunekern
