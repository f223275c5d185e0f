#include "loops/threads.h"

#include <atomic>
#include <exception>

#ifdef PRUNEKERN_STD_THREADS  // for ThreadSanitizer, which does not know libgomp's barriers
#include <thread>
#include <vector>
#elif defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace prunekern {
namespace {

// libgomp hangs in the child of a process that used it, whoever used it: watched from the start, not from our
// own first use.
std::atomic<bool> forked{false};
#if defined(__unix__) || defined(__APPLE__)
[[maybe_unused]] const int watching = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

}  // namespace

void parallel(int threads, const std::function<void(int, int)>& part) {
  if (threads <= 1) return part(0, 1);
  if (forked) return part(0, 1);
  std::exception_ptr failure;
#ifdef PRUNEKERN_STD_THREADS
  std::vector<std::exception_ptr> failures(threads);
  std::vector<std::thread> others;
  auto guarded = [&](int i) {
    try {
      part(i, threads);
    } catch (...) {
      failures[i] = std::current_exception();
    }
  };
  try {
    for (int i = 1; i < threads; ++i) others.emplace_back(guarded, i);
    guarded(0);
  } catch (...) {  // no thread to be had: those that run must be joined all the same
    failure = std::current_exception();
  }
  for (std::thread& other : others) other.join();
  for (const std::exception_ptr& one : failures)
    if (failure == nullptr) failure = one;
#elif defined(_OPENMP)
#pragma omp parallel num_threads(threads)
  {
    try {
      part(omp_get_thread_num(), omp_get_num_threads());
    } catch (...) {
#pragma omp critical(prunekern_failure)
      failure = std::current_exception();
    }
  }
#else
  part(0, 1);
#endif
  if (failure) std::rethrow_exception(failure);
}

}  // namespace prunekern
