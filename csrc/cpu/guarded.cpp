// Signal handlers for the time of one call, not a forked child: a child would copy page tables (tens of ms in
// a process of many GB), run other people's pthread_atfork handlers, and show up in the host program's
// SIGCHLD and waitpid(-1). Handlers belong to the whole process, so a signal of any other thread is handed on
// as if we were not here.
#include "cpu/guarded.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <string.h>
#endif

namespace prunekern {

#if defined(__unix__) || defined(__APPLE__)
namespace {

constexpr int kSignals[] = {SIGILL, SIGSEGV, SIGBUS, SIGFPE};
constexpr int kCount = sizeof(kSignals) / sizeof(kSignals[0]);

struct sigaction previous[kCount];
sigjmp_buf escape;
pthread_t guarded_thread;

void hand_on(int which, int signal, siginfo_t* info, void* context) {
  const struct sigaction& other = previous[which];
  if (other.sa_flags & SA_SIGINFO)
    other.sa_sigaction(signal, info, context);
  else if (other.sa_handler != SIG_DFL && other.sa_handler != SIG_IGN)
    other.sa_handler(signal);
  else
    sigaction(signal, &other, nullptr);  // the instruction runs again and meets what it would have met
}

void on_signal(int signal, siginfo_t* info, void* context) {
  if (pthread_equal(pthread_self(), guarded_thread)) siglongjmp(escape, signal);
  for (int i = 0; i < kCount; ++i)
    if (kSignals[i] == signal) hand_on(i, signal, info, context);
}

}  // namespace

int run_guarded(void (*action)()) {
  guarded_thread = pthread_self();
  sigset_t ours, before;
  sigemptyset(&ours);
  struct sigaction handler;
  memset(&handler, 0, sizeof handler);
  handler.sa_sigaction = on_signal;
  handler.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&handler.sa_mask);
  for (int i = 0; i < kCount; ++i) {
    sigaddset(&ours, kSignals[i]);
    sigaction(kSignals[i], &handler, &previous[i]);
  }
  pthread_sigmask(SIG_UNBLOCK, &ours, &before);  // a blocked one would end the process
  const int caught = sigsetjmp(escape, 1);
  if (caught == 0) action();
  for (int i = 0; i < kCount; ++i) sigaction(kSignals[i], &previous[i], nullptr);
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return caught;
}

#else

int run_guarded(void (*)()) { return -1; }

#endif

}  // namespace prunekern
