// Whether AMX may be used, asked once.
#pragma once

#include "prunekern/isa.h"

namespace prunekern {

// cpuid, then what the operating system saves on a context switch (XCR0), then its permission for this
// process, then a guarded self-test. Asking for permission changes the process (larger signal frames), so
// only a CPU that has everything else is asked.
AmxVerdict probe_amx();

// What amx_verdict() calls. The tests put a probe here that finds tiles emulated in software.
extern AmxVerdict (*amx_probe)();

// The last step alone, guarded or (where the tests emulate the instructions) not.
AmxVerdict self_test_amx(bool guarded);

}  // namespace prunekern
