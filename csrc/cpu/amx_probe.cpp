#include "cpu/amx_probe.h"

#include <cerrno>
#include <cstring>
#include <string>

#include "cpu/amx_self_test.h"
#include "cpu/guarded.h"

#ifdef PRUNEKERN_AMX
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace prunekern {

AmxVerdict (*amx_probe)() = probe_amx;

#ifdef PRUNEKERN_AMX
namespace {

constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA

bool cpu_has_it() {
  unsigned a, b, c, d, a1, b1, c1, d1;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !__get_cpuid_count(7, 1, &a1, &b1, &c1, &d1)) return false;
  const unsigned wanted = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
  return (d & wanted) == wanted && (a1 >> 5 & 1);          // AVX512_BF16
}

// The caller knows that the CPU has XSAVE.
bool tiles_are_saved() {
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low >> 17 & 3) == 3;  // XTILECFG, XTILEDATA
}

}  // namespace

AmxVerdict self_test_amx(bool guarded) {
  static AmxSelfTest result;
  const auto run = [] { result = amx_self_test(); };
  if (const int signal = guarded ? run_guarded(run) : (run(), 0); signal != 0)
    return {false, "self-test failed: " + std::string(strsignal(signal))};
  if (result.failed)
    return {false, "self-test failed: a product of tiles gave " + std::to_string(result.got) + " for " +
                       std::to_string(result.want)};
  return {true, "works"};
}

// Nothing here reads cpuid leaf 0x1D: hypervisors hide it, and palette 1 has had one shape ever since.
AmxVerdict probe_amx() {
  if (!cpu_has_it()) return {false, "cpu lacks AMX"};
  if (!tiles_are_saved()) return {false, "operating system does not enable it"};
#if defined(__linux__) && defined(SYS_arch_prctl)
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0)
    return {false, "operating system does not enable it: " + std::string(std::strerror(errno))};
#endif
  return self_test_amx(true);
}
#else
AmxVerdict self_test_amx(bool) { return {false, "not built: the compiler does not know AMX"}; }
AmxVerdict probe_amx() { return self_test_amx(true); }
#endif

}  // namespace prunekern
