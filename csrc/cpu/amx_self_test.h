// Whether tiles multiply right.
#pragma once

namespace prunekern {

struct AmxSelfTest {
  bool failed = false;
  float got = 0.0f, want = 0.0f;
};

// A product of small integers, through the row of the table, beside plain arithmetic. Nothing in it needs a
// destructor: it may be left by a signal.
AmxSelfTest amx_self_test();

}  // namespace prunekern
