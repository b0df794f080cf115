#include "team.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>

namespace fusedrnn {

void Barrier::wait(int size) {
  const int generation = generation_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    generation_.store(generation + 1, std::memory_order_release);
    return;
  }
  for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; ++spins) {
    if (spins < 2000) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    } else {
      sched_yield();
    }
  }
}

namespace {

// A forked child inherits an OpenMP runtime that believes in threads which did not come along, and waits for them for
// ever. Watched from the moment this library is loaded: others may have started that runtime before our first team.
std::atomic<bool> forked{false};
[[maybe_unused]] const int watching = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// The entry points of GNU OpenMP, looked up in what the process has loaded already: torch brings a libgomp, and a
// second one linked here would fight with it for the cores.
struct OpenMp {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
  int (*thread_num)();
  int (*num_threads)();
  int (*in_parallel)();

  OpenMp() {
    find(parallel, "GOMP_parallel");
    find(thread_num, "omp_get_thread_num");
    find(num_threads, "omp_get_num_threads");
    find(in_parallel, "omp_in_parallel");
  }

  template <class F>
  static void find(F& function, const char* name) {
    function = reinterpret_cast<F>(dlsym(RTLD_DEFAULT, name));
  }

  bool usable() const { return parallel && thread_num && num_threads && in_parallel && !forked && !in_parallel(); }
};

struct Region {
  void (*work)(void*, const Team&);
  void* context;
  const OpenMp* openmp;
  Barrier barrier;
};

void run_member(void* data) {
  Region& region = *static_cast<Region*>(data);
  region.work(region.context, Team{region.openmp->thread_num(), region.openmp->num_threads(), &region.barrier});
}

}  // namespace

void run_team(int threads, void (*work)(void*, const Team&), void* context) {
  static const OpenMp openmp;
  Region region{work, context, &openmp, {}};
  if (threads > 1 && openmp.usable())
    openmp.parallel(run_member, &region, static_cast<unsigned>(threads), 0);
  else
    work(context, Team{0, 1, &region.barrier});
}

}  // namespace fusedrnn
