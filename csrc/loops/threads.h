// The one place that starts threads.
#pragma once

#include <cstdint>
#include <functional>

namespace prunekern {

// Calls part(i, count) for i = 0 .. count - 1 at once, count <= threads; the caller's thread is one of them.
// With one thread, and in a forked child (where libgomp can wait for ever for threads that the fork did not
// copy), it is a plain part(0, 1). The first exception is thrown again here.
void parallel(int threads, const std::function<void(int, int)>& part);

}  // namespace prunekern
