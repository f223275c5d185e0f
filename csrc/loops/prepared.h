// Blocks of rows as a row of the table wants them, and a thread that is set up for its products.
#pragma once

#include "kernels/kernel.h"
#include "loops/pipeline.h"
#include "loops/products.h"
#include "loops/rows.h"

namespace prunekern {

// A thread's set-up, for as long as this lives.
class Session {
 public:
  explicit Session(const Product& product) : product_(product) {
    if (product.begin != nullptr) product.begin();
  }
  ~Session() {
    if (product_.end != nullptr) product_.end();
  }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

 private:
  const Product& product_;
};

struct PreparedScratch {
  Scratch tiles, gathered;
};

// Rows [rows) of x, kept columns side by side.
PreparedRows prepare_rows(const Product& product, const Kernels& kernels, const Input& input, Range rows,
                          PreparedScratch& scratch);

}  // namespace prunekern
