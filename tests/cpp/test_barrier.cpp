// The barrier alone, on threads that ThreadSanitizer knows.
#include <sched.h>

#include <thread>
#include <vector>

#include "check.h"
#include "team.h"

namespace {

// Plain variables on purpose: only the barrier orders their accesses.
void test(int size) {
  constexpr int rounds = 2000;
  fusedrnn::Barrier barrier;
  std::vector<int> written(static_cast<size_t>(size)), wrong(written.size());
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank)
    threads.emplace_back([&, rank] {
      for (int round = 1; round <= rounds; ++round) {
        written[static_cast<size_t>(rank)] = round;
        barrier.wait(size);
        for (const int other : written) wrong[static_cast<size_t>(rank)] += other != round;
        barrier.wait(size);
      }
    });
  for (std::thread& thread : threads) thread.join();
  for (const int count : wrong) CHECK(count == 0, "%d stale values with %d threads", count, size);
}

}  // namespace

int main() {
  for (int size = 1; size <= 4; ++size) test(size);
#if defined(__linux__)
  // On one core, where those that wait do not spin.
  cpu_set_t core;
  CPU_ZERO(&core);
  CPU_SET(sched_getcpu(), &core);
  CHECK(sched_setaffinity(0, sizeof core, &core) == 0, "cannot stay on one core");
  for (int size = 2; size <= 4; ++size) test(size);
#endif
  return check::result();
}
