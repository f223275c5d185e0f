// What attention draws into the cache before it is asked for.
#pragma once

#include <algorithm>
#include <cstdint>

#include "loops/attention_head.h"
#include "loops/scratch.h"

namespace prunekern {

// Draws what an item will read into L2, some lines after every tile of the one before. Its rows lie pages
// apart, where no hardware prefetcher follows: 8 % at 8 x 128 tokens, whose q, k and v outgrow L2.
class Ahead {
 public:
  void start(const AttentionCall& call, const Item& item, std::int64_t tiles) {
    const std::int64_t qk = call.qk_first[item.head], v = call.v_first[item.head];
    const std::int64_t qk_floats = call.qk_first[item.head + 1] - qk, s = item.sequence;
    parts_[0] = {call.k + s * call.k_batch_stride + qk, call.k_stride, call.keys, line_count(qk_floats)};
    parts_[1] = {call.v + s * call.v_batch_stride + v, call.v_stride, call.keys,
                 line_count(call.v_first[item.head + 1] - v)};
    parts_[2] = {call.q + s * call.q_batch_stride + call.shared_by * qk + item.queries.begin * call.q_stride,
                 call.q_stride, item.queries.size(), line_count(call.shared_by * qk_floats)};
    part_ = row_ = 0;
    std::int64_t lines = 0;
    for (const Part& part : parts_) lines += part.rows * part.lines;
    lines_ = ceil_div(lines, tiles);
  }

  void step() {
    for (std::int64_t left = lines_; left > 0 && part_ < 3;) {
      const Part& part = parts_[part_];
      if (row_ == part.rows) {
        ++part_;
        row_ = 0;
        continue;
      }
      const float* row = part.data + row_++ * part.stride;
      for (std::int64_t i = 0; i < part.lines; ++i) __builtin_prefetch(row + i * (kLine / 4), 0, 2);
      left -= std::max<std::int64_t>(part.lines, 1);
    }
  }

 private:
  struct Part {
    const float* data;
    std::int64_t stride, rows, lines;
  };
  static std::int64_t line_count(std::int64_t floats) { return floats == 0 ? 0 : floats * 4 / kLine + 1; }

  Part parts_[3] = {};
  std::int64_t part_ = 3, row_ = 0, lines_ = 0;
};

}  // namespace prunekern
