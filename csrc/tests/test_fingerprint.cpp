// fingerprint: what it must see change, at odd sizes, strides and widths.
#include "tests/check.h"

using namespace prunekern;

namespace {

constexpr Look kLooks[] = {Look::few, Look::lines, Look::all};

template <class Bits>
void sees(std::int64_t rows, std::int64_t columns, std::int64_t row_stride, std::int64_t column_stride) {
  std::vector<Bits> values(rows * row_stride + columns * column_stride + 1);
  std::mt19937 engine(1);
  for (Bits& value : values) value = static_cast<Bits>(engine());
  const MatrixView matrix{values.data(), rows, columns, row_stride, column_stride, sizeof(Bits)};
  const auto at = [&](std::int64_t i, std::int64_t j) -> Bits& {
    return values[i * row_stride + j * column_stride];
  };
  for (Look look : kLooks) {
    const std::uint64_t before = fingerprint(matrix, look);
    CHECK(fingerprint(matrix, look) == before, "not repeatable");
    const std::vector<Bits> kept = values;
    for (Bits& value : values) value = static_cast<Bits>(value + 1);
    CHECK(fingerprint(matrix, look) != before, "%ld x %ld look %d: all changed", long(rows), long(columns),
          int(look));
    values = kept;
    CHECK(fingerprint(matrix, look) == before, "did not come back");
    if (look == Look::few) continue;
    for (std::int64_t i = 0; i < rows; ++i) {
      for (std::int64_t j = 0; j < columns; ++j) at(i, j) = static_cast<Bits>(at(i, j) + 1);
      CHECK(fingerprint(matrix, look) != before, "%ld x %ld look %d: row %ld", long(rows), long(columns),
            int(look), long(i));
      values = kept;
    }
    for (std::int64_t j = 0; j < columns; ++j) {
      for (std::int64_t i = 0; i < rows; ++i) at(i, j) = static_cast<Bits>(at(i, j) + 1);
      CHECK(fingerprint(matrix, look) != before, "%ld x %ld look %d: column %ld", long(rows), long(columns),
            int(look), long(j));
      values = kept;
    }
  }
  const std::uint64_t before = fingerprint(matrix, Look::all);
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::int64_t j = 0; j < columns; ++j) {
      at(i, j) = static_cast<Bits>(at(i, j) ^ 1);
      CHECK(fingerprint(matrix, Look::all) != before, "value %ld, %ld", long(i), long(j));
      at(i, j) = static_cast<Bits>(at(i, j) ^ 1);
    }
}

}  // namespace

int main() {
  for (const auto& [rows, columns] : {std::pair<std::int64_t, std::int64_t>{1, 1},
                                      {1, 577},
                                      {129, 1},
                                      {5, 129},
                                      {129, 5},
                                      {64, 64},
                                      {40, 33}}) {
    sees<std::uint8_t>(rows, columns, columns, 1);
    sees<std::uint16_t>(rows, columns, columns + 3, 1);
    sees<std::uint32_t>(rows, columns, columns, 1);
    sees<std::uint32_t>(rows, columns, 1, rows);
    sees<std::uint64_t>(rows, columns, 2 * columns, 2);
  }
  // Nothing to look at; and what is refused.
  CHECK(fingerprint({nullptr, 0, 7, 7, 1, 4}, Look::few) == 0, "empty");
  const float value = 1.0f;
  const auto refusal = [&](MatrixView matrix) { return message_of([&] { fingerprint(matrix, Look::few); }); };
  CHECK(refusal({nullptr, 2, 2, 2, 1, 4}).find("data") != std::string::npos, "no data");
  CHECK(refusal({&value, -1, 2, 2, 1, 4}).find("rows") != std::string::npos, "rows");
  CHECK(refusal({&value, 1, 1, 1, 1, 3}).find("bytes") != std::string::npos, "bytes");
  return 0;
}
