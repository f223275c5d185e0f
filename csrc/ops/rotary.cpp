// Rotary positions. 8 bytes read and 4 written for every 3 flops: any loop that vectorises is at the speed of
// the cache.
#include "prunekern/rotary.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "loops/scratch.h"
#include "loops/shares.h"
#include "loops/threads.h"

namespace prunekern {
namespace {

constexpr std::int64_t kFloatsOfOneThread = 1 << 15;  // a second thread costs about what these take

void require(bool ok, const std::string& message) {
  if (!ok) throw std::invalid_argument("rotate_pairs: " + message);
}

// Apart, so that the words are made for a bad pair only: made for all 75 they took most of a call's 13 us.
void refuse_angle(const RotaryCall& call, std::int64_t i) {
  require(false, "angle must be in 0.." + std::to_string(call.angles - 1) + " (got " +
                     std::to_string(call.angle[i]) + " at position " + std::to_string(i) + ")");
}

void check(const RotaryCall& call) {
  require(call.batch >= 0 && call.tokens >= 0 && call.heads >= 0 && call.angles >= 0,
          "sizes must not be negative");
  require(call.shared_by >= 1, "shared_by must be at least 1 (got " + std::to_string(call.shared_by) + ")");
  require(call.arrays >= 1, "arrays must be at least 1 (got " + std::to_string(call.arrays) + ")");
  require(call.first != nullptr && call.first[0] == 0, "first must start with 0");
  for (std::int64_t h = 0; h < call.heads; ++h) {
    const std::int64_t width = call.first[h + 1] - call.first[h];
    require(width >= 0 && width % 2 == 0, "first must ascend in even steps (got " + std::to_string(width) +
                                              " at position " + std::to_string(h + 1) + ")");
  }
  for (std::int64_t i = 0; i < call.first[call.heads] / 2; ++i)
    if (call.angle[i] < 0 || call.angle[i] >= call.angles) refuse_angle(call, i);
  require(call.threads >= 1, "threads must be at least 1 (got " + std::to_string(call.threads) + ")");
}

void turn(const float* x, const float* cos, const float* sin, std::int64_t half, float* y) {
  for (std::int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[half + i];
    y[i] = a * cos[i] - b * sin[i];
    y[half + i] = b * cos[i] + a * sin[i];
  }
}

void run_token(const RotaryCall& call, std::int64_t row, float* cos, float* sin) {
  const std::int64_t sequence = row / call.tokens, token = row % call.tokens;
  const std::int64_t pairs = call.first[call.heads] / 2;
  const float* all_cos = call.cos + sequence * call.cos_batch_stride + token * call.cos_stride;
  const float* all_sin = call.sin + sequence * call.sin_batch_stride + token * call.sin_stride;
  for (std::int64_t i = 0; i < pairs; ++i) {
    cos[i] = all_cos[call.angle[i]];
    sin[i] = all_sin[call.angle[i]];
  }
  const float* x = call.x + sequence * call.x_batch_stride + token * call.x_stride;
  float* y = call.y + sequence * call.y_batch_stride + token * call.y_stride;
  for (std::int64_t array = 0; array < call.arrays; ++array)
    for (std::int64_t h = 0; h < call.heads; ++h) {
      const std::int64_t first = call.first[h] / 2, half = call.first[h + 1] / 2 - first;
      for (std::int64_t i = 0; i < call.shared_by; ++i, x += 2 * half, y += 2 * half)
        turn(x, cos + first, sin + first, half, y);
    }
}

}  // namespace

void rotate_pairs(const RotaryCall& call) {
  check(call);
  const std::int64_t rows = call.batch * call.tokens, pairs = call.first[call.heads] / 2;
  if (rows == 0 || pairs == 0) return;
  const std::int64_t most = 1 + rows * pairs * call.shared_by * call.arrays / kFloatsOfOneThread;
  const int threads = static_cast<int>(std::min<std::int64_t>({call.threads, rows, most}));
  parallel(threads, [&](int i, int count) {
    static thread_local Scratch scratch;
    float* cos = scratch.get<float>(2 * pairs);
    const Range mine = share(rows, i, count);
    for (std::int64_t row = mine.begin; row < mine.end; ++row) run_token(call, row, cos, cos + pairs);
  });
}

}  // namespace prunekern
