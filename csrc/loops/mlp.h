// The loops of an mlp whose layers all go through one row of the table, block by block of rows.
#pragma once

#include "kernels/kernel.h"
#include "kernels/product.h"
#include "loops/rows.h"
#include "loops/shares.h"
#include "loops/windows.h"
#include "prunekern/mlp.h"

namespace prunekern {

// A call and what all of its threads share. Its arguments are checked; up.n, down.n and n_out are not 0.
struct Mlp {
  const MlpCall& call;
  const Kernels& kernels;
  const Windows& windows;  // of out_index
  const Reads& reads;      // of in_index, if there is one

  Input input() const {
    return {call.x,    call.x_stride, call.in_features,
            call.up.k, call.element,  call.in_index == nullptr ? nullptr : &reads};
  }
};

// One thread's rows.
void prepared_mlp(const Product& product, const Mlp& mlp, Range rows);

}  // namespace prunekern
