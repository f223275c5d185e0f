// Large weights belong on huge pages.
#pragma once

#include <cstdint>

namespace prunekern {

constexpr std::int64_t kHugePage = 2 << 20;  // bytes on x86, and a harmless alignment elsewhere

// Few rows stream the weights past page after page: with 4 KiB pages 768 x 3072 weights outgrow the TLB.
// Measured: 4 to 6 % at 1 row, 7 to 10 % at 16. Only a hint, and only for the whole huge pages inside the
// buffer.
void prefer_huge_pages(void* data, std::int64_t bytes);

}  // namespace prunekern
