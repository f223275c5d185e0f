#include "prunekern/fingerprint.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace prunekern {
namespace {

constexpr std::uint64_t kPrime = 0x9E3779B97F4A7C15u;  // 2^64 / golden ratio
constexpr int kFew = 8;
constexpr int kLanes = 4;  // independent sums: one alone would wait five cycles a value

struct Sums {
  std::uint64_t lane[kLanes] = {1, 2, 3, 4};
  // Odd factors lose nothing: two values that differ never give one sum.
  void add(int i, std::uint64_t value) { lane[i] = (lane[i] ^ value) * kPrime + 1; }
  std::uint64_t total() const {
    std::uint64_t sum = 0;
    for (std::uint64_t part : lane) sum = ((sum ^ part) * kPrime) ^ (sum >> 29);
    return sum ^ (sum >> 32);
  }
};

template <class Bits>
struct Reader {
  const MatrixView& matrix;
  std::uint64_t operator()(std::int64_t row, std::int64_t column) const {
    Bits bits;
    std::memcpy(
        &bits,
        static_cast<const char*>(matrix.data) + (row * matrix.row_stride + column * matrix.column_stride) *
                                                    static_cast<std::int64_t>(sizeof(Bits)),
        sizeof(Bits));
    return bits;
  }
};

// use(which, row, column) for each of a few values. Columns by the golden ratio: no width makes them repeat.
template <class Use>
void each_of_few(const MatrixView& m, const Use& use) {
#pragma GCC unroll 8
  for (int i = 0; i < kFew; ++i) {
    const std::uint64_t turn = static_cast<std::uint32_t>(static_cast<std::uint64_t>(i) * 2654435769u);
    use(i, i * m.rows / kFew,
        static_cast<std::int64_t>((turn * static_cast<std::uint64_t>(m.columns)) >> 32));
  }
  use(0, m.rows - 1, m.columns - 1);
}

template <class Bits>
std::uint64_t of_few(const MatrixView& m) {
  const Reader<Bits> read{m};
  Sums sums;
  each_of_few(m,
              [&](int i, std::int64_t row, std::int64_t column) { sums.add(i % kLanes, read(row, column)); });
  return sums.total();
}

template <class Bits>
std::uint64_t of_lines(const MatrixView& m) {
  const Reader<Bits> read{m};
  Sums sums;
  const std::int64_t longer = std::max(m.rows, m.columns);
  std::int64_t row = 0, column = 0;
  for (std::int64_t i = 0; i < longer; ++i) {  // a diagonal, around the edges of the shorter side
    sums.add(static_cast<int>(i % kLanes), read(row, column));
    if (++row == m.rows) row = 0;
    if (++column == m.columns) column = 0;
  }
  return sums.total();
}

template <class Bits>
std::uint64_t of_all(const MatrixView& m) {
  const Reader<Bits> read{m};
  Sums sums;
  for (std::int64_t row = 0; row < m.rows; ++row) {
    std::int64_t column = 0;
    if (m.column_stride == 1) {  // eight bytes at a time
      constexpr std::int64_t kStep = 8 / static_cast<std::int64_t>(sizeof(Bits));
      const char* at = static_cast<const char*>(m.data) + row * m.row_stride * std::int64_t(sizeof(Bits));
      for (; column + kLanes * kStep <= m.columns; column += kLanes * kStep)
        for (int lane = 0; lane < kLanes; ++lane) {
          std::uint64_t word;
          std::memcpy(&word, at + (column + lane * kStep) * std::int64_t(sizeof(Bits)), sizeof(word));
          sums.add(lane, word);
        }
    }
    for (; column < m.columns; ++column) sums.add(static_cast<int>(column % kLanes), read(row, column));
  }
  return sums.total();
}

bool is_few(const MatrixView& m, Look look) { return look == Look::few && m.rows * m.columns > kFew; }

template <class Bits>
std::uint64_t of(const MatrixView& m, Look look) {
  if (look == Look::all || m.rows * m.columns <= kFew) return of_all<Bits>(m);
  return is_few(m, look) ? of_few<Bits>(m) : of_lines<Bits>(m);
}

}  // namespace

void draw_fingerprint(const MatrixView& m, Look look) {
  if (!is_few(m, look)) return;
  each_of_few(m, [&](int, std::int64_t row, std::int64_t column) {
    __builtin_prefetch(static_cast<const char*>(m.data) +
                       (row * m.row_stride + column * m.column_stride) * m.bytes);
  });
}

std::uint64_t fingerprint(const MatrixView& m, Look look) {
  if (m.rows < 0 || m.columns < 0)
    throw std::invalid_argument("fingerprint: rows and columns must not be negative (got " +
                                std::to_string(m.rows) + " and " + std::to_string(m.columns) + ")");
  if (m.rows == 0 || m.columns == 0) return 0;
  if (m.data == nullptr) throw std::invalid_argument("fingerprint: data must not be null");
  switch (m.bytes) {
    case 1:
      return of<std::uint8_t>(m, look);
    case 2:
      return of<std::uint16_t>(m, look);
    case 4:
      return of<std::uint32_t>(m, look);
    case 8:
      return of<std::uint64_t>(m, look);
    default:
      throw std::invalid_argument("fingerprint: bytes must be 1, 2, 4 or 8 (got " + std::to_string(m.bytes) +
                                  ")");
  }
}

}  // namespace prunekern
