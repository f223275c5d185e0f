// Shares of a range, and whole multiples.
#pragma once

#include <cstdint>

namespace prunekern {

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

// The same of `rows` in groups of `group` that stay whole: only the last may be smaller.
inline Range share_groups(Range rows, std::int64_t group, std::int64_t i, std::int64_t count) {
  const Range groups = share(ceil_div(rows.size(), group), i, count);
  const std::int64_t end = rows.begin + groups.end * group;
  return {rows.begin + groups.begin * group, end < rows.end ? end : rows.end};
}

}  // namespace prunekern
