// Any CPU: int4, tiles of 4 rows by 2 vectors of 4 channels.
#include "kernels/generic.h"
#include "kernels/int4_tile.h"
#include "kernels/products.h"

namespace prunekern {
namespace {

struct GenericInt4 : Int4Groups<4> {
  using V = Generic;
  struct Sum {
    std::int32_t v[4];
  };
  struct Bytes {
    signed char v[16];
  };

  static Bytes load(const char* p) {
    Bytes codes;
    __builtin_memcpy(codes.v, p, 16);
    return codes;
  }
  static Bytes low(Bytes codes) {
    for (signed char& code : codes.v) code &= 15;
    return codes;
  }
  static Bytes high(Bytes codes) {
    for (signed char& code : codes.v) code = static_cast<signed char>(code >> 4 & 15);
    return codes;
  }
  static Bytes x(const char* p) {
    Bytes x;
    for (int i = 0; i < 4; ++i) __builtin_memcpy(x.v + 4 * i, p, 4);
    return x;
  }
  static Sum start(const char* p) {
    const int value = four_bytes(p);
    return {{value, value, value, value}};
  }
  static Sum dot(Sum sum, const Bytes& codes, const Bytes& x) {
    for (int i = 0; i < 16; ++i) sum.v[i / 4] += codes.v[i] * x.v[i];
    return sum;
  }
  static V::F total(Sum sum, const char*) {
    return V::each([&](int i) { return static_cast<float>(sum.v[i]); });
  }
  static int put(char* to, V::F q) {
    int sum = 0;
    for (int i = 0; i < 4; ++i) {
      to[i] = static_cast<char>(static_cast<int>(q.v[i]));
      sum += static_cast<int>(q.v[i]);
    }
    return sum;
  }
};

}  // namespace

constexpr Product kGenericInt4 = make_int4_product<GenericInt4, 1, 2, 3, 4>(kNever, kAlways);

}  // namespace prunekern
