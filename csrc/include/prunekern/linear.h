// A linear layer on kept channels: packed weights and compact_linear.
//
// Matrices are row-major; a stride is a number of elements. Bad arguments throw std::invalid_argument; an
// instruction set this CPU lacks throws std::runtime_error. Every function may be called from several threads
// at once.
#pragma once

#include <cstdint>
#include <string>

#include "prunekern/isa.h"

namespace prunekern {

// Every activation maps 0 to 0: that is what makes removing a channel exact.
enum class Activation { none, relu, gelu, gelu_tanh, silu, quick_gelu };
Activation parse_activation(const std::string& text);

// How a packed weight is stored.
enum class WeightType { fp32, bf16, int8, int4 };
const char* name(WeightType type);

// What becomes of x before it meets a weight. `floating`: nothing, weights are widened to fp32. `int8`, with
// int8 and int4 weights: every row is rounded to int8, q = nearest even of x * (127 / largest |x| of the
// row), and the products are summed in int32: exact, up to kMostInt8Inputs of them with int8 weights; with
// int4 weights by groups of 32, and these, times their scales, in fp32. A row that holds NaN or an infinity
// gives NaN throughout; one with nothing above 1e-36 counts as zeros. `automatic`: what is fastest with this
// isa: for int8 and int4 weights int8 or floating; for bf16 weights x rounded to bf16, or floating; sums of
// those are fp32.
enum class Activations { automatic, floating, int8 };
const char* name(Activations activations);
Activations parse_activations(const std::string& text);
constexpr std::int64_t kMostInt8Inputs = 133143;  // 127 * 127 * k < 2^31

// What x, residual and y are. bf16 is std::uint16_t in memory.
enum class Element { fp32, bf16 };

// Columns of one packed panel: 8 (generic), 16 (avx2), 32 (avx512, amx).
std::int64_t panel_width(Isa isa);

// Packs weight [n, k] into panels of w = panel_width(isa) output channels; panel p holds channels
// p*w .. p*w + w - 1, what is missing is zero.
//   fp32: [ceil(n / w), k, w]
//   bf16: [ceil(n / w), ceil(k / 32) * 16, w, 2]: pairs of consecutive k, rounded to nearest even
//   int8: [ceil(n / w), ceil(k / 16) * 4, w, 4]: fours of consecutive k; value = q * scale[channel],
//         scale = largest |weight| of the channel / 127
//   int4: [ceil(n / w), ceil(k / 32)] groups of 32 consecutive k: [4, w, 4] bytes, then [w] scales in fp16.
//         Byte i of a channel holds input i of its group in the lower four bits and input 16 + i in the upper
//         ones, as q + 8, q in -8 .. 7; value = q * scale. The scale is the one that loses least of four
//         around -1/7.5 of the weight that is largest in size, then fitted to the q it gives: 21.8 dB of
//         normal weights. Weights that are rounded so already stay as they are, unless they are below 4e-4.
// NaN and infinite weights: fp32 and bf16 keep them; an int8 channel or int4 group that holds one gives NaN
// throughout, and so does a group with weights above 393,000, whose scale fp16 cannot hold. A group with
// nothing above 2e-7 counts as zeros.
// `packed` must hold packed_bytes(...); fresh memory aligned to 2 MiB is laid on huge pages where Linux has
// them. `scale` [n] is written for int8 and ignored otherwise.
std::int64_t packed_bytes(Isa isa, WeightType type, std::int64_t n, std::int64_t k);
void pack_weight(Isa isa, WeightType type, const float* weight, std::int64_t row_stride,
                 std::int64_t column_stride, std::int64_t n, std::int64_t k, void* packed, float* scale);
// The inverse, in fp32: what the kernels multiply with.
void unpack_weight(Isa isa, WeightType type, const void* packed, const float* scale, std::int64_t n,
                   std::int64_t k, float* weight);

// A packed weight and its bias.
struct Packed {
  WeightType type = WeightType::fp32;
  std::int64_t n = 0;            // outputs it makes
  std::int64_t k = 0;            // inputs it reads
  const void* data = nullptr;    // from pack_weight(isa, type, ...)
  const float* scale = nullptr;  // [n], int8 only: int4 has its scales in the panels
  const float* bias = nullptr;   // [n] or null
  Activations activations = Activations::automatic;
};

// y = scatter(act(gather(x) W^T + bias)) + residual.
struct LinearCall {
  std::int64_t m = 0;            // rows
  std::int64_t in_features = 0;  // columns of x
  std::int64_t n_out = 0;        // columns of y
  Packed weight;                 // k: in_features, or the length of in_index; n: n_out, or that of out_index

  Element element = Element::fp32;  // of x, residual and y: const float*, or const std::uint16_t* for bf16
  const void* x = nullptr;          // [m, in_features]
  std::int64_t x_stride = 0;
  const std::int64_t* in_index = nullptr;   // [k], strictly ascending, or null
  const std::int64_t* out_index = nullptr;  // [n], strictly ascending, or null
  const void* residual = nullptr;           // [m, n_out] or null; may be y itself
  std::int64_t residual_stride = 0;
  void* y = nullptr;  // [m, n_out], every element is written: channels outside out_index get 0 + residual
  std::int64_t y_stride = 0;

  Activation activation = Activation::none;
  int threads = 1;  // with 1 no parallel region is entered
};

void compact_linear(Isa isa, const LinearCall& call);
inline void compact_linear(const LinearCall& call) { compact_linear(active_isa(), call); }

}  // namespace prunekern
