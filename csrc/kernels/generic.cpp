// Any CPU: tiles of 4 rows by 2 vectors of four floats.
#include "kernels/generic.h"

#include "kernels/make_table.h"

namespace prunekern {

constexpr Kernels kGenericKernels = make_kernels<Generic, 1, 2, 3, 4>();

}  // namespace prunekern
