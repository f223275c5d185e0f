#include "loops/huge_pages.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace prunekern {

void prefer_huge_pages(void* data, std::int64_t bytes) {
#ifdef MADV_HUGEPAGE
  const std::uintptr_t begin =
      (reinterpret_cast<std::uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace prunekern
