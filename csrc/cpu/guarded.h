// Runs code that may hold an instruction this machine refuses, and survives it.
#pragma once

namespace prunekern {

// Calls `action` and returns 0, or the number of the signal (SIGILL, SIGSEGV, SIGBUS, SIGFPE) that stopped
// it. `action` must hold nothing that needs a destructor. One caller at a time; where a process cannot catch
// signals (Windows) it is not called and -1 is returned.
int run_guarded(void (*action)());

}  // namespace prunekern
