// One (sequence, head): what positions say to all keys, then blocks of queries, blocks of keys.
//
// A query meets positions in the order of the keys, so its products with them, [rows, n + rows - 1] for a
// tile, are its logits moved by one column a row: written with a stride of one float more, they stand under
// their keys. The products of keys with positions are the same with queries and keys changed over; packing
// turns them, as it does keys. So nothing is gathered.
#include "loops/disentangled_head.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "loops/head_products.h"
#include "loops/scratch.h"

namespace prunekern {
namespace {

constexpr std::int64_t kKeyBlock = 256;  // as in attention_workspace.h
constexpr float kLog2E = 1.44269504f;

// One head, and the memory of its loops.
class Head : private HeadProducts {
 public:
  Head(const DisentangledCall& call, const Kernels& kernel, std::int64_t sequence, std::int64_t head,
       Range queries, std::int64_t n)
      : HeadProducts(kernel, call.arithmetic == Arithmetic::bf16 ? kernel.heads : nullptr),
        n_(n),
        queries_{queries.begin, std::min(queries.end, n)} {
    const std::int64_t a = call.qk_first[head], b = call.v_first[head];
    d_ = call.qk_first[head + 1] - a;
    v_ = call.v_first[head + 1] - b;
    q_ = call.q + sequence * call.q_batch_stride + a;
    k_ = call.k + sequence * call.k_batch_stride + a;
    values_ = call.v + sequence * call.v_batch_stride + b;
    y_ = call.y + sequence * call.y_batch_stride + b;
    q_stride_ = call.q_stride;
    k_stride_ = call.k_stride;
    v_stride_ = call.v_stride;
    y_stride_ = call.y_stride;
    scale_ = call.scale * kLog2E;
    // Row of positions of query i and key j: middle + i - j.
    const std::int64_t middle = call.tokens - 1;
    if (d_ > 0 && call.pos_key != nullptr) {  // columns: key j of query i at end - 1 - i + j
      pos_key_ = call.pos_key + (middle + queries_.end - 1) * call.pos_key_stride + a;
      pos_key_step_ = -call.pos_key_stride;
    }
    if (d_ > 0 && call.pos_query != nullptr) {  // columns: query i of key j at n - 1 - j + i - begin
      pos_query_ = call.pos_query + (middle + queries_.begin - n_ + 1) * call.pos_query_stride + a;
      pos_query_step_ = call.pos_query_stride;
    }
  }

  // mask: of the n tokens, or null where all are.
  void run(const bool* mask) {
    static thread_local Scratch scratch;
    lay_out(Parts(nullptr));
    lay_out(Parts(scratch.get<float>(floats_)));
    pack();
    if (pos_query_ != nullptr) meet_keys();
    for (std::int64_t j = 0; j < n_; ++j) offsets_[j] = j * by_key_stride_;
    const std::int64_t tiles = ceil_div(queries_.size(), kernel_.rows);
    for (std::int64_t t = 0; t < tiles; ++t) {
      const Range tile = share(queries_.size(), t, tiles);
      run_tile({queries_.begin + tile.begin, queries_.begin + tile.end}, mask);
    }
  }

 private:
  // What is left and right of a row of products with positions, where the rows before and after it end.
  std::int64_t margin() const { return kernel_.rows + width_; }
  std::int64_t key_block() const { return std::min(round_up(n_, width_), kKeyBlock); }
  std::int64_t positions() const { return n_ + queries_.size() - 1; }

  void lay_out(Parts parts) {
    const std::int64_t rows = kernel_.rows, block = key_block();
    auto panels = [&](bool is_there, std::int64_t columns, std::int64_t inputs) {
      return take_panels(parts, is_there ? columns : 0, inputs);
    };
    keys_ = panels(true, n_, d_);
    value_panels_ = panels(true, v_, n_);
    key_positions_ = panels(pos_key_ != nullptr, positions(), d_);
    query_positions_ = panels(pos_query_ != nullptr, positions(), d_);
    by_query_stride_ = n_ + 2 * margin();
    by_query_ = parts.take(pos_key_ == nullptr ? 0 : rows * (by_query_stride_ + 1) + 2 * margin());
    by_key_stride_ = queries_.size() + 2 * margin();
    by_key_ = parts.take(pos_query_ == nullptr ? 0 : (n_ + rows) * by_key_stride_ + 2 * margin());
    turned_ = parts.take(pos_query_ == nullptr ? 0 : rows * block);
    scores_ = parts.take(rows * block);
    p_stride_ = odd_lines(block);
    p_ = parts.take(rows * p_stride_);
    sums_ = parts.take(rows * width_);
    take_rows(parts, d_, std::max(d_, block));
    floats_ = parts.taken();
  }

  void pack() {
    offsets_.resize(static_cast<std::size_t>(std::max(n_, positions())));
    auto at = [&](std::int64_t count, std::int64_t stride) {
      for (std::int64_t i = 0; i < count; ++i) offsets_[i] = i * stride;
      return offsets_.data();
    };
    kernel_.attention.pack_keys({k_, at(n_, k_stride_), n_, d_, scale_, keys_.fp32});
    pair_up(keys_);
    kernel_.attention.pack_values({values_, at(n_, v_stride_), n_, v_, value_panels_.fp32});
    pair_up(value_panels_);
    if (pos_key_ != nullptr) {
      kernel_.attention.pack_keys(
          {pos_key_, at(positions(), pos_key_step_), positions(), d_, scale_, key_positions_.fp32});
      pair_up(key_positions_);
    }
    if (pos_query_ != nullptr) {
      kernel_.attention.pack_keys(
          {pos_query_, at(positions(), pos_query_step_), positions(), d_, scale_, query_positions_.fp32});
      pair_up(query_positions_);
    }
  }

  // Products of ready rows with columns `from` to `to` of positions, column c of row r at to_row0[c + r *
  // step].
  void meet(const float* x, std::int64_t stride, std::int64_t count, const Panels& positions,
            std::int64_t from, std::int64_t to, float* to_row0, std::int64_t step) const {
    alignas(64) float ones[kMaxLanes];
    std::fill_n(ones, kMaxLanes, 1.0f);
    for (std::int64_t panel = from / width_; panel * width_ < to; ++panel) {
      // Of the first and the last panel often one half is enough: a tenth of the products.
      const std::int64_t start = panel * width_, half = kernel_.vector;
      const std::int64_t skipped = pairs_ == nullptr && from >= start + half ? half : 0;
      const std::int64_t columns =
          std::min(width_, (to <= start + half ? start + half : positions.columns) - start) - skipped;
      multiply(x, stride, count, positions, panel, 0, d_, sums_, columns, skipped);
      kernel_.attention.combine({sums_, count, columns, nullptr, ones, to_row0 + start + skipped, step});
    }
  }

  // k_j . pos_query for all keys: row j holds queries_, one after the other.
  void meet_keys() const {
    const std::int64_t tiles = ceil_div(n_, kernel_.rows);
    for (std::int64_t t = 0; t < tiles; ++t) {
      const Range keys = share(n_, t, tiles);
      std::int64_t stride = k_stride_;
      const float* x = ready(k_ + keys.begin * k_stride_, stride, keys.size(), d_);
      // Query begin + c - (n - 1 - j) stands in column c.
      float* row0 = by_key_ + margin() + keys.begin * by_key_stride_ + keys.begin - (n_ - 1);
      meet(x, stride, keys.size(), query_positions_, n_ - keys.end, n_ - 1 - keys.begin + queries_.size(),
           row0, by_key_stride_ + 1);
    }
  }

  void run_tile(Range rows, const bool* mask) {
    const std::int64_t count = rows.size();
    alignas(64) float max[kMaxLanes], sum[kMaxLanes] = {}, decay[kMaxLanes], after[kMaxLanes];
    alignas(64) float present[kMaxWidth], all[kMaxWidth];
    std::fill_n(max, kMaxLanes, std::numeric_limits<float>::lowest());
    std::fill_n(all, kMaxWidth, 1.0f);
    for (std::int64_t i = 0; i < kMaxWidth; ++i) present[i] = i < (n_ - 1) % width_ + 1 ? 1.0f : 0.0f;
    for (std::int64_t first = 0; first < n_; first += kKeyBlock) {
      const std::int64_t keys = std::min(kKeyBlock, n_ - first);
      const bool is_last = first + keys == n_;
      score(rows, {first, first + keys});
      if (mask != nullptr) forbid(count, mask + first, keys);
      kernel_.attention.softmax(
          {scores_, count, keys, is_last ? present : all, p_, p_stride_, max, sum, decay});
      for (std::int64_t r = 0; r < count; ++r) after[r] = is_last ? 1.0f / sum[r] : 1.0f;
      std::int64_t stride = p_stride_;
      const float* p = ready(p_, stride, count, keys);
      for (std::int64_t c = 0; c < v_; c += width_) {
        multiply(p, stride, count, value_panels_, c / width_, first, keys, sums_, v_ - c);
        kernel_.attention.combine({sums_, count, std::min(width_, v_ - c), first == 0 ? nullptr : decay,
                                   after, y_ + rows.begin * y_stride_ + c, y_stride_});
      }
    }
  }

  // Logits of a tile of queries with a block of keys.
  void score(Range rows, Range keys) {
    const std::int64_t count = rows.size();
    std::int64_t stride = q_stride_;
    const float* q = ready(q_ + rows.begin * q_stride_, stride, count, d_);
    if (pos_key_ != nullptr && keys.begin == 0) {
      // Key c - (end - 1 - i) stands in column c.
      float* row0 = by_query_ + margin() + rows.begin - queries_.end + 1;
      meet(q, stride, count, key_positions_, queries_.end - rows.end, queries_.end - 1 - rows.begin + n_,
           row0, by_query_stride_ + 1);
    }
    for (std::int64_t p = 0; p * width_ < keys.size(); ++p)
      multiply(q, stride, count, keys_, keys.begin / width_ + p, 0, d_, scores_ + p * count * width_,
               keys.size() - p * width_);
    if (pos_key_ == nullptr && pos_query_ == nullptr) return;
    if (pos_query_ != nullptr) {
      kernel_.attention.pack_keys(
          {by_key_ + margin() + keys.begin * by_key_stride_ + rows.begin - queries_.begin, offsets_.data(),
           keys.size(), count, 1.0f, turned_});
    }
    kernel_.attention.add_positions({scores_, count, keys.size(), pos_query_ == nullptr ? nullptr : turned_,
                                     pos_key_ == nullptr ? nullptr : by_query_ + margin() + keys.begin,
                                     by_query_stride_});
  }

  void forbid(std::int64_t count, const bool* mask, std::int64_t keys) const {
    for (std::int64_t j = 0; j < keys; ++j)
      for (std::int64_t r = 0; !mask[j] && r < count; ++r)
        scores_[(j / width_ * count + r) * width_ + j % width_] = -std::numeric_limits<float>::infinity();
  }

  std::int64_t n_, d_, v_;
  Range queries_;
  const float *q_, *k_, *values_, *pos_key_ = nullptr, *pos_query_ = nullptr;
  float* y_;
  std::int64_t q_stride_, k_stride_, v_stride_, y_stride_, pos_key_step_ = 0, pos_query_step_ = 0;
  float scale_;
  Panels keys_, value_panels_, key_positions_, query_positions_;
  // Products with positions: of a tile of queries with all keys, of all keys with queries_, and the same as
  // the tiles leave scores.
  float *by_query_, *by_key_, *turned_;
  float *scores_, *p_, *sums_;
  std::int64_t by_query_stride_, by_key_stride_, p_stride_, floats_;
  std::vector<std::int64_t> offsets_;
};

// All values of one head averaged, for queries that are no tokens.
void average(const DisentangledCall& call, std::int64_t sequence, std::int64_t head, Range queries,
             const bool* mask) {
  const std::int64_t first = call.v_first[head], v = call.v_first[head + 1] - first;
  const float* values = call.v + sequence * call.v_batch_stride + first;
  std::vector<double> sums;
  for (std::int64_t i = queries.begin; i < queries.end; ++i) {
    if (mask[i]) continue;
    if (sums.empty()) {
      sums.assign(static_cast<std::size_t>(v), 0.0);
      for (std::int64_t j = 0; j < call.tokens; ++j)
        for (std::int64_t c = 0; c < v; ++c) sums[c] += values[j * call.v_stride + c];
    }
    float* y = call.y + sequence * call.y_batch_stride + i * call.y_stride + first;
    for (std::int64_t c = 0; c < v; ++c)
      y[c] = static_cast<float>(sums[c] / static_cast<double>(call.tokens));
  }
}

}  // namespace

void run_queries(const DisentangledCall& call, const Kernels& kernel, std::int64_t sequence,
                 std::int64_t head, Range queries) {
  if (call.v_first[head + 1] == call.v_first[head]) return;
  const bool* mask =
      call.token_mask == nullptr ? nullptr : call.token_mask + sequence * call.token_mask_stride;
  std::int64_t n = call.tokens;  // of keys: up to the last token
  while (mask != nullptr && n > 0 && !mask[n - 1]) --n;
  const bool has_holes = mask != nullptr && std::find(mask, mask + n, false) != mask + n;
  if (n > queries.begin) Head(call, kernel, sequence, head, queries, n).run(has_holes ? mask : nullptr);
  if (mask != nullptr) average(call, sequence, head, queries, mask);
}

}  // namespace prunekern
