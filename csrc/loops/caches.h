// The caches: sizes, and how far ahead weights are drawn into them.
#pragma once

#include <unistd.h>

#include <cstdint>

namespace prunekern {

constexpr std::int64_t kLine = 64;  // bytes of a cache line

inline std::int64_t l2_bytes() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const std::int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return 1 << 20;
}

inline bool is_amd() {
#if defined(PRUNEKERN_X86) && defined(__GNUC__)
  static const bool is_amd = __builtin_cpu_is("amd");
  return is_amd;
#else
  return false;
#endif
}

// Bytes of weights drawn into L2 ahead of the one being multiplied, where each is used once; `fast`: where
// next to nothing is done between two of them. By what the CPU's own prefetchers leave to be done: an EPYC
// reads one row's fp32 weights at 31 GB/s with 2,048 and at 20 with 8,192 (its memory gives 33), but eight
// rows' at 16 and 24. On Sapphire Rapids 8,192 was the best for all.
inline std::int64_t stream_ahead(bool fast) { return fast && is_amd() ? 2048 : 8192; }

// The same of one row's bf16 weights on an EPYC, into L1 and past L2: a token of SmolLM2-135M's shape reads
// its 1.4 MB layers at 26 to 30 GB/s so, at 20 to 24 with 2,048 into L2 (at 27 with 2,048, at 27 with 8,192).
constexpr std::int64_t kStreamAheadL1 = 4096;

// Whether weights that so many rows are multiplied with as integers are best left to the CPU's own
// prefetchers, where each is used once. On an EPYC one row of 1536 x 576 weights that lie in memory takes 42
// us so and 52 drawn in from 16 KB ahead (int8), 19 and 25 (int4); three rows 47 and 52, 22 and 27, but of
// 768 x 3072 int4 weights 77 and 69.
inline bool reads_by_itself(std::int64_t rows) { return rows <= 2 && is_amd(); }

// Lines of y drawn in for a row that a tile is about to write: a panel and its gaps, seldom more.
constexpr std::int64_t kMaxRowLines = 8;

}  // namespace prunekern
