// rotate_pairs against float64: ragged heads, query heads that share a key's angles, strides, threads.
#include <algorithm>

#include "tests/check.h"

using namespace prunekern;

namespace {

constexpr float kPoison = 1e30f;

void run(std::int64_t batch, std::int64_t tokens, std::vector<std::int64_t> first, std::int64_t shared,
         bool one_table, int threads) {
  const std::int64_t heads = static_cast<std::int64_t>(first.size()) - 1, channels = first.back(),
                     angles = 37;
  const std::int64_t x_stride = shared * channels + 3, table_stride = angles + 2;
  const std::vector<float> x = random_floats(batch * tokens * x_stride + 1, 1);
  const std::vector<float> cos = random_floats(batch * tokens * table_stride + 1, 2);
  const std::vector<float> sin = random_floats(batch * tokens * table_stride + 1, 3);
  std::vector<std::int64_t> angle(channels / 2);
  for (std::int64_t i = 0; i < channels / 2; ++i) angle[i] = i * 11 % angles;
  std::vector<float> y(batch * tokens * shared * channels + 9, kPoison);

  RotaryCall call;
  call.batch = batch;
  call.tokens = tokens;
  call.heads = heads;
  call.shared_by = shared;
  call.first = first.data();
  call.angle = angle.data();
  call.angles = angles;
  call.x = x.data();
  call.cos = cos.data();
  call.sin = sin.data();
  call.y = y.data();
  call.x_stride = x_stride;
  call.x_batch_stride = tokens * x_stride;
  call.y_stride = shared * channels;
  call.y_batch_stride = tokens * call.y_stride;
  call.cos_stride = call.sin_stride = table_stride;
  call.cos_batch_stride = call.sin_batch_stride = one_table ? 0 : tokens * table_stride;
  call.threads = threads;
  rotate_pairs(call);

  for (std::int64_t row = 0; row < batch * tokens; ++row) {
    const std::int64_t table = (one_table ? row % tokens : row) * table_stride;
    for (std::int64_t h = 0; h < heads; ++h) {
      const std::int64_t half = (first[h + 1] - first[h]) / 2;
      for (std::int64_t i = 0; i < shared * half; ++i) {
        const std::int64_t a = shared * first[h] + i / half * 2 * half + i % half, b = a + half;
        const std::int64_t at = table + angle[first[h] / 2 + i % half];
        const double p = x[row * x_stride + a], q = x[row * x_stride + b], c = cos[at], s = sin[at];
        const double bound =
            2 * 0x1p-24 * (std::fabs(p * c) + std::fabs(q * s) + std::fabs(q * c) + std::fabs(p * s));
        const double got_a = y[row * shared * channels + a], got_b = y[row * shared * channels + b];
        CHECK(std::fabs(got_a - (p * c - q * s)) <= bound, "row %ld head %ld pair %ld", long(row), long(h),
              long(i));
        CHECK(std::fabs(got_b - (q * c + p * s)) <= bound, "row %ld head %ld pair %ld", long(row), long(h),
              long(i));
      }
    }
  }
  for (std::size_t i = y.size() - 9; i < y.size(); ++i) CHECK(y[i] == kPoison, "wrote past the end");
}

std::string refusal(std::vector<std::int64_t> first, std::vector<std::int64_t> angle, int threads = 1,
                    std::int64_t shared_by = 1) {
  RotaryCall call;
  call.heads = static_cast<std::int64_t>(first.size()) - 1;
  call.first = first.data();
  call.angle = angle.data();
  call.angles = 8;
  call.shared_by = shared_by;
  call.threads = threads;
  return message_of([&] { rotate_pairs(call); });
}

}  // namespace

int main() {
  for (std::int64_t tokens : {1, 5, 129})
    for (std::int64_t shared : {1, 3})
      for (bool one_table : {false, true})
        run(2, tokens, {0, 2, 2, 36, 38, 102}, shared, one_table, int(1 + tokens % 3));
  run(1, 2000, {0, 64, 100}, 2, true, 3);
  run(0, 5, {0, 4}, 1, false, 1);
  run(2, 5, {0, 0}, 1, false, 1);
  const std::string start = "rotate_pairs: ";
  CHECK(refusal({0, 4, 7}, {0, 1, 2}) == start + "first must ascend in even steps (got 3 at position 2)",
        "odd");
  CHECK(refusal({0, 4}, {0, 8}) == start + "angle must be in 0..7 (got 8 at position 1)", "angle");
  CHECK(refusal({1, 4}, {0}) == start + "first must start with 0", "start");
  CHECK(refusal({0, 2}, {0}, 0) == start + "threads must be at least 1 (got 0)", "threads");
  CHECK(refusal({0, 2}, {0}, 1, 0) == start + "shared_by must be at least 1 (got 0)", "shared_by");
  return 0;
}
