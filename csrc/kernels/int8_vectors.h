// int8 products of vector units, written once for any vector type V.
#pragma once

#include "kernels/int8_groups.h"

namespace prunekern {

// Without VNNI. vpmaddubsw adds two products in 16 bits and saturates; what is exact are 16-bit values
// through vpmaddwd: inputs 0 and 2 of every four, then 1 and 3. Two multiplications and two additions for
// what fp32 does in four multiply-adds.
template <class V_, int rows>
struct Int8Madd : Int8Groups<Int8Madd<V_, rows>, rows, 8, 0> {
  using V = V_;
  using Sum = typename V::I;
  struct Halves {
    typename V::I even, odd;  // inputs 0 and 2, 1 and 3
  };
  using Weights = Halves;
  using X = Halves;

  static Weights weights(const char* p) {
    const typename V::I four = V::load_int(p);
    return {V::even_bytes(four), V::odd_bytes(four)};
  }
  static X x(const char* p) {
    return {V::set_int(Int8Madd::four_bytes(p)), V::set_int(Int8Madd::four_bytes(p + 4))};
  }
  static Sum dot(Sum sum, const Weights& weights, const X& x) {
    return V::dot_words(V::dot_words(sum, weights.even, x.even), weights.odd, x.odd);
  }
  static Sum zero() { return V::set_int(0); }
  static Sum start(const char*, int) { return zero(); }
  static Sum add(Sum a, Sum b) { return V::add_int(a, b); }
  static void store(float* p, Sum a) { V::store_int(p, a); }
  static std::int32_t sum(Sum) { return 0; }  // needs none
  static void put(char* to, typename V::F scaled, Sum&) { V::store_words(to, V::to_int(scaled)); }
};

// VNNI: vpdpbusd multiplies unsigned by signed. Weights become unsigned by adding 128 (one xor for each
// vector, that is 2 for 28 products of AVX-512: not to be seen on an EPYC, whose xor goes to units the
// products leave free, 7 % at most on a Xeon), so that the sums are too large by 128 times the sum of the row
// of x: they begin with minus that.
template <class V_, int rows>
struct Int8Vnni : Int8Groups<Int8Vnni<V_, rows>, rows, 4, 128> {
  using V = V_;
  using Sum = typename V::I;
  using Weights = typename V::I;
  using X = typename V::I;

  static Weights weights(const char* p) { return V::add_128_to_bytes(V::load_int(p)); }
  static X x(const char* p) { return V::set_int(Int8Vnni::four_bytes(p)); }
  static Sum dot(Sum sum, Weights weights, X x) { return V::dot_fours(sum, weights, x); }
  static Sum zero() { return V::set_int(0); }
  static Sum start(const char* tail, int r) { return V::set_int(Int8Vnni::start_of(tail, r)); }
  static Sum add(Sum a, Sum b) { return V::add_int(a, b); }
  static void store(float* p, Sum a) { V::store_int(p, a); }
  static std::int32_t sum(Sum a) { return V::sum_int(a); }
  static void put(char* to, typename V::F scaled, Sum& total) {
    const Sum q = V::to_int(scaled);
    total = V::add_int(total, q);
    V::store_bytes(to, V::to_bytes(q));
  }
};

}  // namespace prunekern
