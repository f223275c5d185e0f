// compact_linear and compact_mlp with bf16 weights on AMX: rows of x are rounded to bf16, sums are fp32.
#pragma once

#include "kernels/kernel.h"
#include "plan.h"
#include "prunekern/mlp.h"

namespace prunekern {

// Whether this product goes through tiles. Few rows do not: they wait for weights either way (2 KB of them
// come from the last-level cache in about 220 cycles, 4 rows multiply them in 200 on the vector units), and
// there x stays fp32.
constexpr std::int64_t kAmxMinRows = 5;
inline bool amx_takes(Isa isa, WeightType type, std::int64_t m) {
  return isa == Isa::amx && type == WeightType::bf16 && m >= kAmxMinRows;
}

#ifdef PRUNEKERN_AMX
// Arguments are checked, neither m nor weight.n nor n_out is 0. `reads`: of in_index, if there is one.
void amx_linear(const LinearCall& call, const Kernels& kernels, const Windows& windows, const Reads& reads);

// The same for an mlp, on the calling thread: rows [begin, end) of it. The rows between the layers are bf16.
void amx_mlp(const MlpCall& call, const Kernels& kernels, const Windows& windows, const Reads& reads,
             std::int64_t begin, std::int64_t end);
#else  // amx is no instruction set of this build
inline void amx_linear(const LinearCall&, const Kernels&, const Windows&, const Reads&) {}
inline void amx_mlp(const MlpCall&, const Kernels&, const Windows&, const Reads&, std::int64_t,
                    std::int64_t) {}
#endif

}  // namespace prunekern
