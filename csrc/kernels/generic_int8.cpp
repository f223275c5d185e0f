// Any CPU: int8, tiles of 4 rows by 2 vectors of 4 channels. Half as fast as fp32 on SSE2: only where it is
// asked for.
#include "kernels/generic.h"
#include "kernels/int8_groups.h"
#include "kernels/products.h"

namespace prunekern {
namespace {

struct GenericInt8 : Int8Groups<GenericInt8, 4, 8, 0> {
  using V = Generic;
  struct Sum {
    std::int32_t v[4];
  };
  struct Weights {
    std::int16_t v[4][4];  // channel, input
  };
  struct X {
    std::int16_t v[4];
  };

  static Weights weights(const char* p) {
    Weights weights;
    for (int i = 0; i < 16; ++i) weights.v[i / 4][i % 4] = static_cast<signed char>(p[i]);
    return weights;
  }
  static X x(const char* p) {
    X x;
    __builtin_memcpy(x.v, p, 8);
    return x;
  }
  static Sum dot(Sum acc, const Weights& weights, const X& x) {
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 4; ++j) acc.v[i] += weights.v[i][j] * x.v[j];
    return acc;
  }
  static Sum zero() { return {{0, 0, 0, 0}}; }
  static Sum start(const char*, int) { return zero(); }
  static Sum add(Sum a, Sum b) {
    for (int i = 0; i < 4; ++i) a.v[i] += b.v[i];
    return a;
  }
  static void store(float* p, Sum a) { __builtin_memcpy(p, a.v, 16); }
  static std::int32_t sum(const Sum&) { return 0; }  // needs none
  static void put(char* to, V::F scaled, Sum&) {
    const V::F q = V::round(scaled);
    std::int16_t words[4];
    for (int i = 0; i < 4; ++i) words[i] = static_cast<std::int16_t>(q.v[i]);
    __builtin_memcpy(to, words, 8);
  }
};

}  // namespace

constexpr Product kGenericInt8 = make_dot_product<GenericInt8, RowScaledSums<Generic>, 1, 2, 3, 4>(
    WeightType::int8, Arithmetic::int8, kNever, kAlways);

}  // namespace prunekern
