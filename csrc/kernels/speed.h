// What this CPU can do at best: the two yardsticks of every measurement.
#pragma once

#include "kernels/kernel.h"

namespace prunekern {

// What the FMA units can do: twelve independent chains (two units, four or five cycles each) and no memory.
template <class V>
std::int64_t peak(std::int64_t steps) {
  constexpr int kChains = 12;
  typename V::F acc[kChains], scale = V::set(0.5f), one = V::set(1.0f);
  for (int i = 0; i < kChains; ++i) acc[i] = V::set(static_cast<float>(i));
  for (std::int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) acc[i] = V::madd(acc[i], scale, one);
  }
  float sink[V::kWidth];
  for (int i = 1; i < kChains; ++i) acc[0] = V::add(acc[0], acc[i]);
  V::store(sink, acc[0]);
  volatile float used = sink[0];  // or the compiler drops it all
  (void)used;
  return steps * kChains * V::kWidth * 2;
}

// What memory can deliver.
template <class V>
std::uint64_t read(const char* memory, std::int64_t bytes) {
  constexpr int kBlock = 256, kAhead = 4096;
  constexpr int kVectorBytes = V::kWidth * 4, kChains = 4;
  typename V::F acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = V::set(0.0f);
  std::int64_t at = 0;
  for (; at + kBlock <= bytes; at += kBlock) {
    for (int line = 0; line < kBlock; line += 64) __builtin_prefetch(memory + at + kAhead + line, 0, 2);
#pragma GCC unroll 16
    for (int i = 0; i < kBlock / kVectorBytes; ++i)
      acc[i % kChains] =
          V::mix(acc[i % kChains], V::load(reinterpret_cast<const float*>(memory + at) + i * V::kWidth));
  }
  for (int i = 1; i < kChains; ++i) acc[0] = V::mix(acc[0], acc[i]);
  std::uint64_t words[V::kWidth / 2], sum = 0;
  V::store(reinterpret_cast<float*>(words), acc[0]);
  for (int i = 0; i < V::kWidth / 2; ++i) sum ^= words[i];
  for (int shift = 0; at < bytes; ++at, shift += 8)
    sum ^= static_cast<std::uint64_t>(static_cast<unsigned char>(memory[at])) << shift % 64;
  return sum;
}

}  // namespace prunekern
