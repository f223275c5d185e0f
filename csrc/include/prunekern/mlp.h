// Two or three compact linears and the activation between them, block by block of rows: the rows between the
// layers stay in the L2 cache and are never written to memory.
#pragma once

#include "prunekern/linear.h"

namespace prunekern {

// y = scatter(down(act(up(gather(x))))) + residual, or with a gate scatter(down(act(gate(x)) * up(x))).
struct MlpCall {
  std::int64_t m = 0;            // rows
  std::int64_t in_features = 0;  // columns of x
  std::int64_t n_out = 0;        // columns of y
  Packed up, down;               // down.k = up.n
  Packed gate;                   // like up; data null: no gate

  Element element = Element::fp32;  // of x, residual and y
  const void* x = nullptr;          // [m, in_features]
  std::int64_t x_stride = 0;
  const std::int64_t* in_index = nullptr;   // [up.k], strictly ascending, or null: what up and gate read
  const std::int64_t* out_index = nullptr;  // [down.n], strictly ascending, or null
  const void* residual = nullptr;           // [m, n_out] or null; may be y itself, but not x
  std::int64_t residual_stride = 0;
  void* y = nullptr;  // [m, n_out], every element is written
  std::int64_t y_stride = 0;

  Activation activation = Activation::gelu;
  int threads = 1;
};

void compact_mlp(Isa isa, const MlpCall& call);
inline void compact_mlp(const MlpCall& call) { compact_mlp(active_isa(), call); }

}  // namespace prunekern
