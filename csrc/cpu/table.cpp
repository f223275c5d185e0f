// Which table goes with which instruction set, and with which rows besides fp32 arithmetic.
#include "cpu/table.h"

#include <chrono>
#include <cstdio>
#include <stdexcept>
#include <string>

#include "cpu/supported.h"
#include "kernels/products.h"

namespace prunekern {
namespace {

// A product goes into the tables of its sets. Among those that take the same call the last one wins.
struct Row {
  Isa isa;
  const Product* product;
};
constexpr Row kRows[] = {
    {Isa::generic, &kGenericInt8},
    {Isa::generic, &kGenericInt4},
#ifdef PRUNEKERN_X86
    {Isa::avx2, &kAvx2Int8},
    {Isa::avx2, &kAvx2Int4},
    {Isa::avx512, &kAvx512Int8},
    {Isa::avx512, &kAvx512Int4},
#endif
#ifdef PRUNEKERN_AVX2_VNNI
    {Isa::avx2_vnni, &kAvx2VnniInt8},
    {Isa::avx2_vnni, &kAvx2VnniInt4},
#endif
#ifdef PRUNEKERN_AVX512_VNNI
    {Isa::avx512_vnni, &kAvx512VnniInt8},
    {Isa::avx512_vnni, &kAvx512VnniInt4},
    {Isa::avx512_bf16, &kAvx512VnniInt8},
    {Isa::avx512_bf16, &kAvx512VnniInt4},
    {Isa::amx, &kAvx512VnniInt8},
    {Isa::amx, &kAvx512VnniInt4},
#endif
#ifdef PRUNEKERN_AVX512_BF16
    {Isa::avx512_bf16, &kAvx512Bf16},
    {Isa::amx, &kAvx512Bf16},
#endif
#ifdef PRUNEKERN_AMX
    {Isa::amx, &kAmxBf16},
    {Isa::amx, &kAmxInt8},
#endif
};

const Kernels& fp32_kernels(Isa isa) {
#ifdef PRUNEKERN_X86
  if (isa == Isa::avx2 || isa == Isa::avx2_vnni) return kAvx2Kernels;
  if (isa != Isa::generic) return kAvx512Kernels;
#else
  (void)isa;
#endif
  return kGenericKernels;
}

// Flops a nanosecond, of the quickest of a few short runs.
double speed(PeakFn peak) {
  constexpr std::int64_t kSteps = 20000;
  double best = 0.0;
  for (int i = 0; i < 5; ++i) {
    const auto start = std::chrono::steady_clock::now();
    const std::int64_t flops = peak(kSteps);
    const std::chrono::duration<double, std::nano> took = std::chrono::steady_clock::now() - start;
    if (flops / took.count() > best) best = flops / took.count();
  }
  return best;
}

#ifdef PRUNEKERN_AVX512_BF16
Bf16Verdict measure_bf16() {
  if (!is_supported(Isa::avx512_bf16)) return {false, "cpu lacks AVX-512 BF16"};
  const double ratio = speed(kAvx512Bf16.peak) / speed(kAvx512Kernels.peak);
  char text[80];
  std::snprintf(text, sizeof text, "vectors of bf16 multiply %.1f times as fast as fp32", ratio);
  // It is 2 on an EPYC and 0.5 on Sapphire Rapids. Few rows read half the bytes either way.
  return {ratio > 1.2, text};
}
#else
Bf16Verdict measure_bf16() { return {false, "not built: the compiler does not know AVX-512 BF16"}; }
#endif

bool is_wanted(const Row& row) {
#ifdef PRUNEKERN_AVX512_BF16
  if (row.product == &kAvx512Bf16) return bf16_verdict().pays;
#endif
  return row.product != nullptr;
}

Kernels make_table(Isa isa) {
  Kernels table = fp32_kernels(isa);
  int next = 0;
  for (const Row& row : kRows)
    if (row.isa == isa && is_wanted(row)) table.products[next++] = row.product;
#ifdef PRUNEKERN_AVX512_BF16
  if ((isa == Isa::avx512_bf16 || isa == Isa::amx) && bf16_verdict().pays) table.heads = &kAvx512Bf16Heads;
#endif
  return table;
}

template <Isa isa>
const Kernels& table_of() {
  static const Kernels table = make_table(isa);
  return table;
}

}  // namespace

const Bf16Verdict& bf16_verdict() {
  static const Bf16Verdict verdict = measure_bf16();
  return verdict;
}

const Kernels& kernels(Isa isa) {
  if (!is_supported(isa))
    throw std::runtime_error("this CPU cannot run " + std::string(name(isa)) + " (it can run " +
                             supported_names() + ")");
  switch (isa) {
    case Isa::avx2:
      return table_of<Isa::avx2>();
    case Isa::avx2_vnni:
      return table_of<Isa::avx2_vnni>();
    case Isa::avx512:
      return table_of<Isa::avx512>();
    case Isa::avx512_vnni:
      return table_of<Isa::avx512_vnni>();
    case Isa::avx512_bf16:
      return table_of<Isa::avx512_bf16>();
    case Isa::amx:
      return table_of<Isa::amx>();
    default:
      return table_of<Isa::generic>();
  }
}

std::int64_t panel_width(Isa isa) { return fp32_kernels(isa).width; }

std::int64_t run_peak(Isa isa, std::int64_t steps, Arithmetic arithmetic) {
  const Kernels& table = kernels(isa);
  if (arithmetic == Arithmetic::fp32) return table.peak(steps);
  const Product* found = nullptr;
  for (const Product* one : table.products)
    if (one != nullptr && one->arithmetic == arithmetic && one->peak != nullptr) found = one;
  return found == nullptr ? 0 : found->peak(steps);
}

std::uint64_t run_read(Isa isa, const void* memory, std::int64_t bytes) {
  return kernels(isa).read(static_cast<const char*>(memory), bytes);
}

}  // namespace prunekern
