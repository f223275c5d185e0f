// The loops of a linear layer, one thread's share of it: rows x panels of the result.
#pragma once

#include "kernels/kernel.h"
#include "kernels/product.h"
#include "loops/rows.h"
#include "loops/shares.h"
#include "loops/windows.h"

namespace prunekern {

// A call and what all of its threads share. Its arguments are checked; neither m nor weight.n nor n_out is 0.
struct Linear {
  const LinearCall& call;
  const Kernels& kernels;
  const Windows& windows;  // of out_index
  const Reads& reads;      // of in_index, if there is one

  Input input() const {
    return {call.x,        call.x_stride, call.in_features,
            call.weight.k, call.element,  call.in_index == nullptr ? nullptr : &reads};
  }
};

// In fp32 arithmetic, which takes any weights: they are widened on their way, or a panel at a time.
void fp32_linear(const Linear& linear, Range rows, Range panels);

// By a product of the table; rows begin at whole groups of it.
void prepared_linear(const Product& product, const Linear& linear, Range rows, Range panels);

}  // namespace prunekern
