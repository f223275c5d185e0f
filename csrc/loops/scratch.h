// Scratch memory of a thread.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "loops/caches.h"
#include "loops/huge_pages.h"
#include "loops/shares.h"

namespace prunekern {

// Offset of row i of `rows` rows of `floats` floats: an odd number of lines, so that the rows of a tile do
// not meet in one set of L1.
inline std::int64_t odd_lines(std::int64_t floats) { return round_up(floats, 32) + 16; }

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

}  // namespace prunekern
