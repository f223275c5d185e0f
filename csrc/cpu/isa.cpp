// What this CPU can do. The one place that asks.
#include "prunekern/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/amx_probe.h"
#include "cpu/supported.h"

#ifdef PRUNEKERN_X86
#include <cpuid.h>
#endif

namespace prunekern {
namespace {

#ifdef PRUNEKERN_X86
struct Cpu {
  bool avx2 = false, avx2_vnni = false, avx512 = false, avx512_vnni = false, avx512_bf16 = false;

  Cpu() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return;
    const bool fma = c >> 12 & 1, f16c = c >> 29 & 1, osxsave = c >> 27 & 1;
    if (!osxsave) return;
    unsigned low, high;  // XCR0: the registers the operating system saves; cpuid alone does not tell
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    const bool ymm = (low & 0x6) == 0x6, zmm = (low & 0xe6) == 0xe6;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    avx2 = ymm && fma && f16c && (b >> 5 & 1);
    const unsigned wanted = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
    avx512 = avx2 && zmm && (b & wanted) == wanted;
    avx512_vnni = avx512 && (c >> 11 & 1);
    if (a == 0 || !__get_cpuid_count(7, 1, &a, &b, &c, &d)) return;  // has no second part
    avx2_vnni = avx2 && (a >> 4 & 1);
    avx512_bf16 = avx512_vnni && (a >> 5 & 1);
  }
};
#endif

Isa choose() {
  const char* wanted = std::getenv("PRUNEKERN_ISA");
  if (wanted == nullptr || *wanted == '\0') return supported_isas().back();
  const Isa isa = parse_isa(wanted);
  if (!is_supported(
          isa))  // asks for this one only: AMX is tried out to be known, which others need not suffer
    throw std::runtime_error("PRUNEKERN_ISA: this CPU cannot run " + std::string(wanted) + " (it can run " +
                             supported_names() + ")");
  return isa;
}

}  // namespace

bool is_supported(Isa isa) {
#ifdef PRUNEKERN_X86
  static const Cpu cpu;
  if (isa == Isa::avx2) return cpu.avx2;
  if (isa == Isa::avx2_vnni) return cpu.avx2_vnni;
  if (isa == Isa::avx512) return cpu.avx512;
  if (isa == Isa::avx512_vnni) return cpu.avx512_vnni;
  if (isa == Isa::avx512_bf16) return cpu.avx512_bf16;
  if (isa == Isa::amx) return cpu.avx512_vnni && amx_verdict().works;
#endif
  return isa == Isa::generic;
}

std::string supported_names() {
  std::string text;
  for (Isa isa : supported_isas()) text += (text.empty() ? "" : ", ") + std::string(name(isa));
  return text;
}

const char* name(Isa isa) {
  switch (isa) {
    case Isa::avx2:
      return "avx2";
    case Isa::avx2_vnni:
      return "avx2_vnni";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512_vnni:
      return "avx512_vnni";
    case Isa::avx512_bf16:
      return "avx512_bf16";
    case Isa::amx:
      return "amx";
    default:
      return "generic";
  }
}

Isa parse_isa(const std::string& text) {
  std::string names;
  for (int i = 0; i < kIsas; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (text == name(isa)) return isa;
    names += (i == 0 ? "" : i + 1 == kIsas ? " or " : ", ") + std::string(name(isa));
  }
  throw std::invalid_argument("PRUNEKERN_ISA must be " + names + " (got " + text + ")");
}

std::vector<Isa> supported_isas() {
  std::vector<Isa> isas;
  for (int i = 0; i < kIsas; ++i)
    if (is_supported(static_cast<Isa>(i))) isas.push_back(static_cast<Isa>(i));
  return isas;
}

Isa active_isa() {
  static const Isa isa = choose();
  return isa;
}

const AmxVerdict& amx_verdict() {
  static const AmxVerdict verdict = amx_probe();
  return verdict;
}

}  // namespace prunekern
