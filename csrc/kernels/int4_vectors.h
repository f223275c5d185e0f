// int4 products of vector units, written once for any vector type V.
#pragma once

#include "kernels/int4_tile.h"

namespace prunekern {

// What they have in common, whatever they multiply with.
template <class V_, int rows>
struct Int4Vectors : Int4Groups<rows> {
  using V = V_;
  using Sum = typename V::I;
  using Bytes = typename V::I;

  static Bytes load(const char* p) { return V::load_int(p); }
  static Bytes low(Bytes codes) { return V::low_codes(codes); }
  static Bytes high(Bytes codes) { return V::high_codes(codes); }
  static Bytes x(const char* p) { return V::set_int(Int4Vectors::four_bytes(p)); }
  static int put(char* to, typename V::F q) {
    const auto bytes = V::to_bytes(V::to_int(q));
    Int4Vectors::put_four(to, V::template four_of<0>(bytes));
    Int4Vectors::put_four(to + 4 * rows, V::template four_of<1>(bytes));
    if constexpr (V::kWidth == 16) {
      Int4Vectors::put_four(to + 8 * rows, V::template four_of<2>(bytes));
      Int4Vectors::put_four(to + 12 * rows, V::template four_of<3>(bytes));
    }
    return V::sum_bytes(bytes);
  }
};

// Without VNNI. vpmaddubsw adds two products in 16 bits and saturates, but not here: a lane takes 16 products
// of a group, at most 15 * 127 each, and 16 * 15 * 127 = 30,480 fit.
template <class V_, int rows>
struct Int4Madd : Int4Vectors<V_, rows> {
  using V = V_;
  using I = typename V::I;

  static I start(const char*) { return V::set_int(0); }
  static I dot(I sum, I codes, I x) { return V::dot_twos(sum, codes, x); }
  static typename V::F total(I sum, const char* p) {
    return V::to_float(V::add_int(V::add_twos(sum), V::set_int(Int4Madd::four_bytes(p))));
  }
};

// VNNI: codes are the unsigned operand of vpdpbusd as they are.
template <class V_, int rows>
struct Int4Vnni : Int4Vectors<V_, rows> {
  using V = V_;
  using I = typename V::I;

  static I start(const char* p) { return V::set_int(Int4Vnni::four_bytes(p)); }
  static I dot(I sum, I codes, I x) { return V::dot_fours(sum, codes, x); }
  static typename V::F total(I sum, const char*) { return V::to_float(sum); }
};

}  // namespace prunekern
