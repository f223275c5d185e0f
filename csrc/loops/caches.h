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
// next to nothing is done between two of them. By what the CPU's own prefetchers leave to be done: an EPYC's
// nearly keep up with one row's fp32 weights, and prefetches far ahead make it slower; with eight rows they
// make it faster. On Sapphire Rapids 8,192 was the best for all. `bench.cpu.layers` times layers by rows.
inline std::int64_t stream_ahead(bool fast) { return fast && is_amd() ? 2048 : 8192; }

// The same ahead of a product of the table where a block is one group of rows: on an EPYC far prefetches make
// one or two rows slower here too, and more rows faster.
inline std::int64_t product_ahead(std::int64_t rows) { return rows <= 2 && is_amd() ? 2048 : 16384; }

// The same of one row's bf16 weights on an EPYC, into L1 and past L2, through which they would only pass.
// `bench.cpu.decode` times what that is for: a token of a language model.
constexpr std::int64_t kStreamAheadL1 = 4096;

// Lines of y drawn in for a row that a tile is about to write: a panel and its gaps, seldom more.
constexpr std::int64_t kMaxRowLines = 8;

}  // namespace prunekern
