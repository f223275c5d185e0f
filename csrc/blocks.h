// What every loop over rows and panels needs: shares, scratch memory, the size of L2.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#include "huge_pages.h"

namespace prunekern {

constexpr std::int64_t kLine = 64;           // bytes of a cache line
constexpr std::int64_t kHugePage = 2 << 20;  // bytes on x86, and a harmless alignment elsewhere

struct Range {
  std::int64_t begin, end;
  std::int64_t size() const { return end - begin; }
};

// Part i of count, sizes within one of each other.
inline Range share(std::int64_t total, std::int64_t i, std::int64_t count) {
  return {total * i / count, total * (i + 1) / count};
}

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
inline std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }

// Memory of one thread, kept between calls; what it holds is lost when more is asked for. Large ones lie on
// huge pages: small pages meet in the same sets of L2 by chance (1 to 3 % of an mlp).
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  // Aligned to a cache line.
  template <class T>
  T* get(std::int64_t count) {
    std::int64_t bytes = round_up(count * static_cast<std::int64_t>(sizeof(T)), kLine);
    if (bytes > size_) {
      const bool is_large = bytes >= kHugePage / 4;
      if (is_large) bytes = round_up(bytes, kHugePage);
      std::free(data_);
      data_ = nullptr;
      size_ = 0;
      data_ = std::aligned_alloc(is_large ? kHugePage : kLine, static_cast<std::size_t>(bytes));
      if (data_ == nullptr) throw std::bad_alloc();
      if (is_large) prefer_huge_pages(data_, bytes);
      size_ = bytes;
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  std::int64_t size_ = 0;
};

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

}  // namespace prunekern
