// Decodes and runs the nine instructions the kernels use, after the pseudocode of Intel's manual (volume 2,
// AMX): palette 1, eight tiles of up to 16 rows of 64 bytes.
#include "tests/amx_emulator.h"

#include <signal.h>
#include <ucontext.h>
#include <xmmintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "cpu/amx_probe.h"

namespace prunekern {
namespace {

struct TileConfig {  // what ldtilecfg reads
  std::uint8_t palette, start_row, reserved[14];
  std::uint16_t row_bytes[16];
  std::uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64, "ldtilecfg reads 64 bytes");

struct Tiles {
  TileConfig config;
  alignas(64) unsigned char data[8][16][64];
};

thread_local Tiles tiles;  // the state of the thread's registers; all zero: released
Broken broken = Broken::nothing;

[[noreturn]] void give_up() {  // what the CPU would do: a fault nobody handles
  signal(SIGILL, SIG_DFL);
  raise(SIGILL);
  std::abort();
}

float to_float(std::uint16_t half) {
  const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

int rows_of(int tile) { return tiles.config.rows[tile]; }
int bytes_of(int tile) { return tiles.config.row_bytes[tile]; }

void load_config(const unsigned char* from) {
  std::memset(&tiles, 0, sizeof tiles);
  std::memcpy(&tiles.config, from, 64);
  if (tiles.config.palette != 1) give_up();
  for (int i = 0; i < 16; ++i) {
    const bool used = tiles.config.rows[i] != 0;
    if (used != (tiles.config.row_bytes[i] != 0) || tiles.config.rows[i] > 16 ||
        tiles.config.row_bytes[i] > 64 || (used && i >= 8))
      give_up();
  }
}

void check_shapes(int to, int a, int b) {
  if (bytes_of(to) != bytes_of(b) || rows_of(to) != rows_of(a) || bytes_of(a) / 4 != rows_of(b)) give_up();
}

// Groups of four signed bytes times groups of four signed bytes, added to int32, which wraps around.
void multiply_int8(int to, int a, int b) {
  check_shapes(to, a, b);
  const int columns = bytes_of(to) / 4, groups = bytes_of(a) / 4;
  for (int m = 0; m < rows_of(to); ++m) {
    std::uint32_t sum[16];
    std::memcpy(sum, tiles.data[to][m], 64);
    for (int k = 0; k < groups; ++k) {
      signed char x[4], weights[64];
      std::memcpy(x, tiles.data[a][m] + 4 * k, 4);
      std::memcpy(weights, tiles.data[b][k], 64);
      for (int n = 0; n < columns; ++n)
        for (int i = 0; i < 4; ++i) sum[n] += static_cast<std::uint32_t>(x[i] * weights[4 * n + i]);
    }
    for (int n = 0; n < columns; ++n) sum[n] += broken == Broken::int8 ? 1 : 0;
    std::memcpy(tiles.data[to][m], sum, static_cast<std::size_t>(4 * columns));
  }
}

// Pairs of bf16 times pairs of bf16, added to fp32: even and odd sums apart, then together; no denormals.
void multiply_bf16(int to, int a, int b) {
  check_shapes(to, a, b);
  const unsigned before = _mm_getcsr();
  _mm_setcsr(0x9fc0);  // flush to zero, denormals are zero, round to nearest, no exceptions
  const int columns = bytes_of(to) / 4, pairs = bytes_of(a) / 4;
  for (int m = 0; m < rows_of(to); ++m) {
    float even[16] = {}, odd[16] = {}, sum[16];
    for (int k = 0; k < pairs; ++k) {
      std::uint16_t x[2], weights[32];
      std::memcpy(x, tiles.data[a][m] + 4 * k, 4);
      std::memcpy(weights, tiles.data[b][k], 64);
      for (int n = 0; n < columns; ++n) {
        even[n] = __builtin_fmaf(to_float(x[0]), to_float(weights[2 * n]), even[n]);
        odd[n] = __builtin_fmaf(to_float(x[1]), to_float(weights[2 * n + 1]), odd[n]);
      }
    }
    std::memcpy(sum, tiles.data[to][m], 64);
    for (int n = 0; n < columns; ++n) sum[n] += even[n] + odd[n] + (broken == Broken::bf16 ? 1.0f : 0.0f);
    std::memcpy(tiles.data[to][m], sum, static_cast<std::size_t>(4 * columns));
  }
  _mm_setcsr(before);
}

using Registers = greg_t*;

std::uint64_t value_of(Registers registers, int number) {  // in the numbering of instructions
  constexpr int kOrder[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                              REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return static_cast<std::uint64_t>(registers[kOrder[number]]);
}

// One VEX instruction of map 0F38.
struct Instruction {
  int opcode, prefix, reg, rm, third;  // prefix: 0 none, 1 66, 2 F3, 3 F2
  bool in_memory;
  unsigned char* address = nullptr;
  std::int64_t stride = 0;
  int length = 0;

  Instruction(const unsigned char* code, Registers registers) {
    if (code[0] != 0xc4 || (code[1] & 0x1f) != 2 || (code[2] & 0x84) != 0) give_up();
    const int index_high = code[1] & 0x40 ? 0 : 8, base_high = code[1] & 0x20 ? 0 : 8;
    third = ~code[2] >> 3 & 15;
    prefix = code[2] & 3;
    opcode = code[3];
    const int mode = code[4] >> 6;
    reg = code[4] >> 3 & 7;
    rm = code[4] & 7;
    in_memory = mode != 3;
    length = 5;
    if (!in_memory) return;
    std::uint64_t at = 0;
    bool far = mode == 2, relative = false;
    if (rm == 4) {  // base + stride (index << scale)
      const int sib = code[length++], index = (sib >> 3 & 7) | index_high;
      if ((sib & 7) == 5 && mode == 0)
        far = true;
      else
        at = value_of(registers, (sib & 7) | base_high);
      if (index != 4) stride = static_cast<std::int64_t>(value_of(registers, index)) << (sib >> 6);
    } else if (rm == 5 && mode == 0) {
      far = relative = true;
    } else {
      at = value_of(registers, rm | base_high);
    }
    std::int32_t offset = 0;
    if (far) {
      std::memcpy(&offset, code + length, 4);
      length += 4;
    } else if (mode == 1) {
      offset = static_cast<signed char>(code[length++]);
    }
    if (relative) at = static_cast<std::uint64_t>(registers[REG_RIP]) + static_cast<std::uint64_t>(length);
    address =
        reinterpret_cast<unsigned char*>(at + static_cast<std::uint64_t>(static_cast<std::int64_t>(offset)));
  }
};

void emulate(int, siginfo_t*, void* context) {
  Registers registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const Instruction one(reinterpret_cast<const unsigned char*>(registers[REG_RIP]), registers);
  const bool configured = tiles.config.palette == 1;
  if (one.opcode == 0x49 && one.prefix == 0 && one.in_memory) {  // ldtilecfg
    load_config(one.address);
  } else if (one.opcode == 0x49 && one.prefix == 0) {  // tilerelease
    std::memset(&tiles, 0, sizeof tiles);
  } else if (!configured) {
    give_up();
  } else if (one.opcode == 0x49 && one.prefix == 3 && !one.in_memory) {  // tilezero
    std::memset(tiles.data[one.reg], 0, sizeof tiles.data[0]);
  } else if (one.opcode == 0x4b && (one.prefix == 3 || one.prefix == 1) && one.in_memory) {  // tileloadd(t1)
    std::memset(tiles.data[one.reg], 0, sizeof tiles.data[0]);
    for (int r = 0; r < rows_of(one.reg); ++r)
      std::memcpy(tiles.data[one.reg][r], one.address + r * one.stride,
                  static_cast<std::size_t>(bytes_of(one.reg)));
  } else if (one.opcode == 0x4b && one.prefix == 2 && one.in_memory) {  // tilestored
    for (int r = 0; r < rows_of(one.reg); ++r)
      std::memcpy(one.address + r * one.stride, tiles.data[one.reg][r],
                  static_cast<std::size_t>(bytes_of(one.reg)));
  } else if (one.opcode == 0x5c && one.prefix == 2 && !one.in_memory) {  // tdpbf16ps
    multiply_bf16(one.reg, one.rm, one.third);
  } else if (one.opcode == 0x5e && one.prefix == 3 && !one.in_memory) {  // tdpbssd
    multiply_int8(one.reg, one.rm, one.third);
  } else {
    give_up();
  }
  registers[REG_RIP] += one.length;
}

bool cpu_has_the_rest() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bf16");
}

}  // namespace

std::string provide_amx() {
  if (!cpu_has_the_rest()) return "";
  if (probe_amx().works) return "hardware";
  struct sigaction action;
  std::memset(&action, 0, sizeof action);
  action.sa_sigaction = emulate;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGILL, &action, nullptr);
  amx_probe = [] { return self_test_amx(false); };
  return "emulated";
}

bool amx_in_use() {
  if (amx_probe != probe_amx) return tiles.config.palette != 0;
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(1));  // XCR0 and what is not in its initial state
  return (low >> 17 & 3) != 0;
}

void break_emulated_amx(Broken what) { broken = what; }

}  // namespace prunekern
