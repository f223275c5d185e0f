// Which table goes with which instruction set, and with which rows besides fp32 arithmetic.
#include "cpu/table.h"

#include <stdexcept>
#include <string>

#include "cpu/supported.h"
#include "kernels/product.h"
#ifdef PRUNEKERN_AMX
#include "kernels/amx.h"
#endif

namespace prunekern {
namespace {

// A product goes into the table of its set. Among those that take the same call the last one wins.
struct Row {
  Isa isa;
  const Product* product;
};
constexpr Row kRows[] = {
#ifdef PRUNEKERN_AMX
    {Isa::amx, &kAmxBf16},
#endif
    {Isa::generic, nullptr},
};

const Kernels& fp32_kernels(Isa isa) {
#ifdef PRUNEKERN_X86
  if (isa == Isa::avx2) return kAvx2Kernels;
  if (isa == Isa::avx512 || isa == Isa::amx) return kAvx512Kernels;
#else
  (void)isa;
#endif
  return kGenericKernels;
}

Kernels make_table(Isa isa) {
  Kernels table = fp32_kernels(isa);
  int next = 0;
  for (const Row& row : kRows)
    if (row.isa == isa && row.product != nullptr) table.products[next++] = row.product;
  return table;
}

}  // namespace

const Kernels& kernels(Isa isa) {
  static const Kernels tables[] = {make_table(Isa::generic), make_table(Isa::avx2), make_table(Isa::avx512),
                                   make_table(Isa::amx)};
  if (!is_supported(isa))
    throw std::runtime_error("this CPU cannot run " + std::string(name(isa)) + " (it can run " +
                             supported_names() + ")");
  return tables[static_cast<int>(isa)];
}

std::int64_t panel_width(Isa isa) {
  switch (isa) {
    case Isa::avx2:
      return 16;
    case Isa::avx512:
    case Isa::amx:
      return 32;
    default:
      return 8;
  }
}

std::int64_t run_peak(Isa isa, std::int64_t steps) { return kernels(isa).peak(steps); }

std::uint64_t run_read(Isa isa, const void* memory, std::int64_t bytes) {
  return kernels(isa).read(static_cast<const char*>(memory), bytes);
}

}  // namespace prunekern
