// prunekern: compact linear layers on the CPU. The whole public C++ API: raw pointers, strides, a thread
// count.
//
// All matrices are fp32 and row-major; a stride is a number of elements. Bad arguments throw
// std::invalid_argument; an instruction set this CPU lacks throws std::runtime_error. Every function may be
// called from several threads at once.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace prunekern {

enum class Isa { generic, avx2, avx512 };

// Every activation maps 0 to 0: that is what makes removing a channel exact.
enum class Activation { none, relu, gelu, gelu_tanh, silu };

const char* name(Isa isa);
Isa parse_isa(const std::string& text);
Activation parse_activation(const std::string& text);

// What this CPU and its operating system can run, worst first. `generic` is always there.
std::vector<Isa> supported_isas();

// The best of supported_isas(), or what the environment variable PRUNEKERN_ISA asks for (read once; throws
// where the CPU cannot run it).
Isa active_isa();

// Columns of one packed panel: 8 (generic), 16 (avx2), 32 (avx512).
std::int64_t panel_width(Isa isa);

// Packs weight [n, k] into panels [ceil(n / w), k, w] with w = panel_width(isa): panel p holds output
// channels p*w .. p*w + w - 1, the last one padded with zeros. `packed` must hold packed_size(isa, n, k)
// floats; fresh memory aligned to 2 MiB is laid on huge pages where Linux has them.
std::int64_t packed_size(Isa isa, std::int64_t n, std::int64_t k);
void pack_weight(Isa isa, const float* weight, std::int64_t row_stride, std::int64_t column_stride,
                 std::int64_t n, std::int64_t k, float* packed);
void unpack_weight(Isa isa, const float* packed, std::int64_t n, std::int64_t k, float* weight);

// y = scatter(act(gather(x) W^T + bias)) + residual.
struct LinearCall {
  std::int64_t m = 0;            // rows
  std::int64_t in_features = 0;  // columns of x
  std::int64_t k = 0;            // inputs the weight reads: in_features, or the length of in_index
  std::int64_t n = 0;            // outputs the weight makes: n_out, or the length of out_index
  std::int64_t n_out = 0;        // columns of y

  const float* x = nullptr;  // [m, in_features]
  std::int64_t x_stride = 0;
  const float* packed = nullptr;            // from pack_weight(isa, ...)
  const float* bias = nullptr;              // [n] or null
  const std::int64_t* in_index = nullptr;   // [k], strictly ascending, or null
  const std::int64_t* out_index = nullptr;  // [n], strictly ascending, or null
  const float* residual = nullptr;          // [m, n_out] or null; may be y itself
  std::int64_t residual_stride = 0;
  float* y = nullptr;  // [m, n_out], every element is written: channels outside out_index get 0 + residual
  std::int64_t y_stride = 0;

  Activation activation = Activation::none;
  int threads = 1;  // with 1 no OpenMP region is entered
};

void compact_linear(Isa isa, const LinearCall& call);
inline void compact_linear(const LinearCall& call) { compact_linear(active_isa(), call); }

// Runs multiply-adds that touch no memory and returns their number of flops: time it, and you have the peak
// that compact_linear is to be measured against. 100,000 steps take a millisecond or less.
std::int64_t run_peak(Isa isa, std::int64_t steps);

}  // namespace prunekern
