// prunekern._C: addresses and sizes in, numbers out. No torch: prunekern/ops checks tensors and passes
// addresses, or hands ordinary tensors to an eager call.
#include "python/module.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "prunekern's C++ core. Addresses are integers; 0 means not given.";
  prunekern::add_machine(m);
  prunekern::add_packing(m);
  prunekern::add_eager(m);
  prunekern::add_linear(m);
  prunekern::add_mlp(m);
  prunekern::add_any_trains(m);
  prunekern::add_attention(m);
  prunekern::add_rotary(m);
  prunekern::add_norm(m);
  prunekern::add_decoder_block(m);
  prunekern::add_disentangled_attention(m);
  prunekern::add_encoder_block(m);
  prunekern::add_prenorm_block(m);
  prunekern::add_unchanged(m);
}
