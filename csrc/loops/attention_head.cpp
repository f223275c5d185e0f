// One (sequence, head) after the other, blocks of queries, blocks of keys.
//
// What to expect of one core at about 165 GFLOP/s: 128 tokens and a head of 64 channels make 4.2 MFLOP, 25
// us. Around the products, by operations: powers of two 16,384 x 11 / 16 lanes = 2 us, packing keys 1 us,
// packing values 0.3 us. Packed, both stay in L2 (64 KB), a block of scores and its powers in L1.
#include "loops/attention_head.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels/product.h"
#include "loops/attention_ahead.h"
#include "loops/attention_workspace.h"
#include "loops/products.h"
#include "loops/seen_keys.h"

namespace prunekern {
namespace {

constexpr float kLog2E = 1.44269504f;

// Allowed keys and values of one head where they lie, in elements from its channel 0.
struct InPlace {
  const float *keys, *values;
  const std::int64_t *k_row, *v_row;
  float scale;
  NextRows next;  // of the head that comes after this one
};

// Queries x all allowed keys of one head.
struct Head {
  const Kernels& kernel;
  std::int64_t keys_there, qk, v;  // allowed keys, channels
  const Range* seen;               // [queries]: which of the allowed keys each may read; null: all
  const float* q;                  // at query 0
  std::int64_t q_stride;
  float* y;
  std::int64_t y_stride;
  const InPlace* in_place;  // null: packed, in the workspace
  const Product* pairs;     // null: fp32
  const float* bias;        // at query 0 and key 0; null: none
  std::int64_t bias_stride;
  const std::int64_t* key_at;  // [keys_there]: which of all keys those are; null: the first ones

  // One tile of queries.
  void run(Range rows, const Workspace& work, Ahead& ahead) const {
    const std::int64_t width = kernel.width, count = rows.size();
    // Both ends of what they see ascend. Blocks begin at whole panels, and at whole steps of a product.
    const std::int64_t n = seen == nullptr ? keys_there : seen[rows.end - 1].end;
    const std::int64_t whole = pairs == nullptr ? width : std::max(width, pairs->step_inputs);
    const std::int64_t begin = seen == nullptr ? 0 : seen[rows.begin].begin / whole * whole;
    alignas(64) float max[kMaxLanes], sum[kMaxLanes] = {}, decay[kMaxLanes], after[kMaxLanes];
    alignas(64) float present[kMaxWidth], all[kMaxWidth];
    std::fill_n(max, kMaxLanes, std::numeric_limits<float>::lowest());
    std::fill_n(all, kMaxWidth, 1.0f);
    for (std::int64_t i = 0; i < kMaxWidth; ++i) present[i] = i < (n - 1) % width + 1 ? 1.0f : 0.0f;
    const float* a = q + rows.begin * q_stride;
    std::int64_t a_stride = q_stride;
    if (a_stride * 4 % 4096 == 0) {  // whole pages: the rows of a tile would meet in one set of L1
      for (std::int64_t r = 0; r < count; ++r)
        std::memcpy(work.q + r * work.q_stride, a + r * a_stride, static_cast<std::size_t>(qk) * 4);
      a = work.q;
      a_stride = work.q_stride;
    }
    if (pairs != nullptr) prepare(a, a_stride, count, qk, work.q_tile);
    for (std::int64_t first = begin; first < n; first += kKeyBlock) {
      const std::int64_t keys = std::min(kKeyBlock, n - first);
      const bool last = first + keys == n;
      score({first, first + keys}, a, a_stride, count, work, ahead);
      if (bias != nullptr) add_bias(rows, {first, first + keys}, work.scores);
      if (seen != nullptr) forbid(rows, {first, first + keys}, work.scores);
      kernel.attention.softmax(
          {work.scores, count, keys, last ? present : all, work.p, work.p_stride, max, sum, decay});
      if (seen != nullptr) take_out(rows, {first, first + keys}, work);
      if (pairs != nullptr) prepare(work.p, work.p_stride, count, keys, work.p_tile);
      for (std::int64_t r = 0; r < count; ++r) after[r] = last ? 1.0f / sum[r] : 1.0f;
      for (std::int64_t c = 0; c < v; c += width) {
        const float* sums = weigh({first, first + keys}, c, rows, work, ahead);
        kernel.attention.combine({sums, count, std::min(width, v - c), first == begin ? nullptr : decay,
                                  after, y + rows.begin * y_stride + c, y_stride});
      }
    }
    if (seen != nullptr)
      for (std::int64_t r = rows.begin; r < rows.end; ++r)
        if (seen[r].size() == 0) std::fill_n(y + r * y_stride, v, 0.0f);
  }

  // Scores of `count` rows from a on with a block of keys.
  void score(Range keys, const float* a, std::int64_t a_stride, std::int64_t count, const Workspace& work,
             Ahead& ahead) const {
    if (in_place != nullptr)
      return kernel.attention.score({a,
                                     a_stride,
                                     count,
                                     in_place->keys,
                                     in_place->k_row + keys.begin,
                                     keys.size(),
                                     qk,
                                     in_place->scale,
                                     work.scores,
                                     {in_place->values, in_place->v_row + keys.begin, keys.size(), v}});
    for (std::int64_t p = 0; pairs != nullptr && p * kernel.width < keys.size(); ++p) {
      multiply(work.q_tile, qk, count,
               work.key_pairs + (keys.begin / kernel.width + p) * steps(*pairs, qk) * pairs->panel_step_bytes,
               keys.size() - p * kernel.width, work.scores + p * count * kernel.width);
      ahead.step();
    }
    for (std::int64_t p = 0; pairs == nullptr && p * kernel.width < keys.size(); ++p) {
      TileArgs args{};
      args.a = a;
      args.a_stride = a_stride;
      args.panel = work.keys + (keys.begin + p * kernel.width) * qk;
      args.k = qk;
      args.acc = work.scores + p * count * kernel.width;
      tile(keys.size() - p * kernel.width)[count](args);
      ahead.step();
    }
  }

  // What is multiplied after a block's values: its next block's keys, or the next head's.
  NextRows next_keys(Range keys) const {
    if (keys.end == keys_there) return in_place->next;
    return {in_place->keys, in_place->k_row + keys.end, keys_there - keys.end, qk};
  }

  // Powers of scores x a block of values: sums of the panel of channels from c on. In place all come at once.
  const float* weigh(Range keys, std::int64_t c, Range rows, const Workspace& work, Ahead& ahead) const {
    if (in_place != nullptr) {
      if (c == 0)
        kernel.attention.weigh({work.p, work.p_stride, rows.size(), in_place->values,
                                in_place->v_row + keys.begin, keys.size(), v, work.sums, next_keys(keys)});
      return work.sums + c * rows.size();
    }
    const std::int64_t columns = std::min<std::int64_t>(kernel.width, v - c);
    if (pairs != nullptr) {
      const std::int64_t panel = c / kernel.width * steps(*pairs, keys_there) * pairs->panel_step_bytes;
      multiply(work.p_tile, keys.size(), rows.size(),
               work.value_pairs + panel + steps(*pairs, keys.begin) * pairs->panel_step_bytes, columns,
               work.sums);
      ahead.step();
      return work.sums;
    }
    TileArgs args{};
    args.a = work.p;
    args.a_stride = work.p_stride;
    args.panel = work.values + c * keys_there + keys.begin * kernel.width;
    args.k = keys.size();
    args.acc = work.sums;
    args.y = reinterpret_cast<const char*>(y + rows.begin * y_stride + c);
    args.y_step = y_stride * 4;
    args.row_lines = ceil_div(columns * 4, kLine) + 1;
    tile(columns)[rows.size()](args);
    ahead.step();
    return work.sums;
  }

  // In the scores' unit, log 2. 16,384 scores of a head of 128 tokens: 2 us where no key is forbidden.
  void add_bias(Range rows, Range keys, float* scores) const {
    const std::int64_t width = kernel.width, count = rows.size();
    for (std::int64_t at = keys.begin; at < keys.end; at += width) {
      const std::int64_t columns = std::min(width, keys.end - at);
      float* panel = scores + (at - keys.begin) * count;
      for (std::int64_t r = 0; r < count; ++r) {
        const float* from = bias + (rows.begin + r) * bias_stride;
        float* to = panel + r * width;
        if (key_at == nullptr)
          for (std::int64_t i = 0; i < columns; ++i) to[i] += kLog2E * from[at + i];
        else
          for (std::int64_t i = 0; i < columns; ++i) to[i] += kLog2E * from[key_at[at + i]];
      }
    }
  }

  // Scores of keys that a row does not see: only the blocks on the diagonal, or at the ends of a window, have
  // any.
  void forbid(Range rows, Range keys, float* scores) const {
    const std::int64_t width = kernel.width, count = rows.size();
    for (std::int64_t r = 0; r < count; ++r) {
      auto forbid_from = [&](std::int64_t first, std::int64_t end) {
        for (std::int64_t p = first / width; first < end; ++p) {
          const std::int64_t next = std::min(end, (p + 1) * width);
          std::fill(scores + p * count * width + r * width + first - p * width,
                    scores + p * count * width + r * width + next - p * width,
                    -std::numeric_limits<float>::infinity());
          first = next;
        }
      };
      const Range row = seen[rows.begin + r];
      forbid_from(0, std::min(row.begin, keys.end) - keys.begin);
      forbid_from(std::max(row.end, keys.begin) - keys.begin, keys.size());
    }
  }

  // The powers of those scores, which are 2^-126: sums that begin with them would be denormal, and eight
  // times slower.
  void take_out(Range rows, Range keys, const Workspace& work) const {
    for (std::int64_t r = 0; r < rows.size(); ++r) {
      const Range row = seen[rows.begin + r];
      float* p = work.p + r * work.p_stride;
      std::fill(p, p + std::clamp(row.begin, keys.begin, keys.end) - keys.begin, 0.0f);
      std::fill(p + std::clamp(row.end, keys.begin, keys.end) - keys.begin, p + keys.size(), 0.0f);
    }
  }

  // Rows in bf16, and their product with one panel of `columns`.
  void prepare(const float* x, std::int64_t stride, std::int64_t count, std::int64_t k, char* to) const {
    PrepareArgs args{};
    args.x = x;
    args.x_stride = stride;
    args.rows = count;
    args.k = k;
    args.to = to;
    pairs->prepare[static_cast<int>(Element::fp32)](args);
  }
  void multiply(const char* x, std::int64_t k, std::int64_t count, const char* panel, std::int64_t columns,
                float* acc) const {
    ProductArgs args{};
    args.x = x;
    args.row_tiles = 1;
    args.panel = panel;
    args.k_steps = steps(*pairs, k);
    args.acc = acc;
    args.half = columns <= kernel.vector;
    args.rows = count;
    pairs->multiply(args);
  }

  const TileFn* tile(std::int64_t columns) const {
    return columns > kernel.vector ? kernel.tile : kernel.half_tile;
  }
};

// Keys of the next head, where a lone query reads them: in the same sequence the same rows.
NextRows next_head(const AttentionCall& call, const Item& item, const Item* next, std::size_t keys,
                   const std::int64_t* rows) {
  if (next == nullptr || next->sequence != item.sequence) return {};
  const std::int64_t first = call.qk_first[next->head];
  return {call.k + next->sequence * call.k_batch_stride + first, rows, static_cast<std::int64_t>(keys),
          call.qk_first[next->head + 1] - first};
}

}  // namespace

void run_item(const AttentionCall& call, const Kernels& kernel, const Item& item, const Item* next) {
  static thread_local Scratch scratch;
  static thread_local std::vector<std::int64_t> keys, k_row, v_row;
  static thread_local std::vector<Range> seen;
  const std::int64_t sequence = item.sequence, head = item.head, shared = call.shared_by;
  const std::int64_t qk_first = call.qk_first[head], v_first = call.v_first[head];
  const std::int64_t qk = call.qk_first[head + 1] - qk_first, v = call.v_first[head + 1] - v_first;
  if (v == 0) return;
  const float* q = call.q + sequence * call.q_batch_stride + shared * qk_first;
  float* y = call.y + sequence * call.y_batch_stride + shared * v_first;
  allowed_keys(call, sequence, keys);
  const std::int64_t n = static_cast<std::int64_t>(keys.size());
  if (n == 0) {
    for (std::int64_t r = item.queries.begin; r < item.queries.end; ++r)
      std::fill_n(y + r * call.y_stride, shared * v, 0.0f);
    return;
  }

  k_row.resize(keys.size());
  v_row.resize(keys.size());
  for (std::int64_t i = 0; i < n; ++i) {
    k_row[i] = keys[i] * call.k_stride;
    v_row[i] = keys[i] * call.v_stride;
  }
  const InPlace in_place{call.k + sequence * call.k_batch_stride + qk_first,
                         call.v + sequence * call.v_batch_stride + v_first,
                         k_row.data(),
                         v_row.data(),
                         call.scale * kLog2E,
                         next_head(call, item, next, keys.size(), k_row.data())};
  // A lone query sees all keys, in every head that shares them: the heads are the rows of its tile.
  const bool is_lone = call.queries == 1, is_packed = !is_lone || shared > kMaxLoneRows;
  const Product* pairs =
      call.arithmetic == Arithmetic::bf16 && is_packed && !is_lone ? kernel.heads : nullptr;
  const Workspace work(kernel, pairs, n, qk, v, is_packed, scratch);
  if (is_packed) {
    kernel.attention.pack_keys({in_place.keys, in_place.k_row, n, qk, in_place.scale, work.keys});
    kernel.attention.pack_values({in_place.values, in_place.v_row, n, v, work.values});
  }
  if (pairs != nullptr) {
    pairs->pair_up(work.keys, ceil_div(n, kernel.width), qk, work.key_pairs);
    pairs->pair_up(work.values, ceil_div(v, kernel.width), n, work.value_pairs);
  }
  const bool sees_part = (call.causal || (call.window >= 0 && call.window < call.keys - 1)) && !is_lone;
  if (sees_part) find_seen(call, keys, seen);
  const Range queries = is_lone ? Range{0, shared} : item.queries;
  const std::int64_t passes = is_lone ? 1 : shared, tiles = ceil_div(queries.size(), kernel.rows);
  Ahead ahead;
  if (next != nullptr && is_packed)
    ahead.start(
        call, *next,
        passes * tiles * (ceil_div(n, kernel.width) + ceil_div(n, kKeyBlock) * ceil_div(v, kernel.width)));
  for (std::int64_t i = 0; i < passes; ++i) {
    const Head one{
        kernel,
        n,
        qk,
        v,
        sees_part ? seen.data() : nullptr,
        q + i * qk,
        is_lone ? qk : call.q_stride,
        y + i * v,
        is_lone ? v : call.y_stride,
        is_packed ? nullptr : &in_place,
        pairs,
        call.bias == nullptr ? nullptr : call.bias + call.bias_head[head] * call.queries * call.keys,
        call.keys,
        keys.back() == n - 1 ? nullptr : keys.data()};
    for (std::int64_t t = 0; t < tiles; ++t) {
      const Range tile = share(queries.size(), t, tiles);
      one.run({queries.begin + tile.begin, queries.begin + tile.end}, work, ahead);
    }
  }
}

}  // namespace prunekern
