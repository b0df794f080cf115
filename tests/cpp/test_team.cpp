// Teams on the OpenMP runtime: their sizes, what their threads see of one another, nesting, and forked children.
#include <omp.h>
#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "check.h"
#include "team.h"

namespace {

using fusedrnn::run_team;
using fusedrnn::Team;

template <class F>
void run(int threads, F&& work) {
  run_team(threads, [](void* context, const Team& team) { (*static_cast<F*>(context))(team); }, &work);
}

// The size of a team that was asked for; checks its ranks.
int team_size(int threads) {
  std::vector<std::atomic<int>> calls(static_cast<size_t>(threads));
  std::atomic<int> size{0};
  run(threads, [&](const Team& team) {
    size = team.size;
    if (team.rank >= 0 && team.rank < threads) ++calls[static_cast<size_t>(team.rank)];
  });
  for (int rank = 0; rank < threads; ++rank)
    CHECK(calls[static_cast<size_t>(rank)] == (rank < size ? 1 : 0), "rank %d of %d", rank, threads);
  return size;
}

// Each thread sees what the others wrote before the barrier, and nobody writes on before all have seen it.
void test_order(int threads) {
  constexpr int rounds = 500;
  std::vector<int> written(static_cast<size_t>(threads)), wrong(written.size());
  run(threads, [&](const Team& team) {
    const auto rank = static_cast<size_t>(team.rank);
    for (int round = 1; round <= rounds; ++round) {
      written[rank] = round;
      team.sync();
      for (int other = 0; other < team.size; ++other) wrong[rank] += written[static_cast<size_t>(other)] != round;
      team.sync();
    }
  });
  for (const int count : wrong) CHECK(count == 0, "%d stale values with %d threads", count, threads);
}

void test_nesting() {
  std::atomic<int> outer{0}, inner{0};
  run(2, [&](const Team&) {
    ++outer;
    const int size = team_size(3);
    CHECK(size == 1, "a team of %d inside a team", size);
    ++inner;
  });
  CHECK(outer == 2 && inner == 2, "%d and %d calls", outer.load(), inner.load());
  const int size = team_size(2);
  CHECK(size == 2, "a team of %d after a nested one", size);
}

// A child has one thread, whatever the runtime that it inherited believes; an alarm ends it if it waits for others.
void test_fork(const char* when) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    alarm(10);
    const int failures = check::failures, size = team_size(4);
    _exit(size == 1 && check::failures == failures ? 0 : 1);
  }
  int status = -1;
  CHECK(child > 0 && waitpid(child, &status, 0) == child, "no child");
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a child forked %s %s", when,
        WIFSIGNALED(status) ? "hangs or crashes" : "does not run alone");
}

// Keeps each thread of a team of two to a core of its own as long as it lives: nothing is learnt from threads that have
// just been woken on the same one.
class Apart {
 public:
  Apart() {
    CPU_ZERO(&all_);
    CHECK(sched_getaffinity(0, sizeof all_, &all_) == 0, "unknown cores");
    for (int core = 0; core < CPU_SETSIZE; ++core)
      if (CPU_ISSET(core, &all_)) cores_.push_back(core);
    if (!possible()) return;
    run(2, [&](const Team& team) {
      cpu_set_t one;
      CPU_ZERO(&one);
      CPU_SET(cores_[static_cast<size_t>(team.rank)], &one);
      CHECK(sched_setaffinity(0, sizeof one, &one) == 0, "thread %d cannot stay on a core", team.rank);
    });
  }
  ~Apart() {
    if (possible()) run(2, [&](const Team&) { sched_setaffinity(0, sizeof all_, &all_); });
  }
  bool possible() const { return cores_.size() > 1; }

 private:
  cpu_set_t all_;
  std::vector<int> cores_;
};

// A thread that comes late is left out for a while, then tried again; one that comes late again, for longer.
void test_disturbance() {
  using std::chrono::milliseconds;
  const Apart apart;
  if (!apart.possible()) return;
  const auto late = [](milliseconds delay) {
    run(2, [&](const Team& team) {
      if (team.rank == 1) std::this_thread::sleep_for(delay);
    });
  };
  std::this_thread::sleep_for(milliseconds(80));
  late(milliseconds(0));  // forgets what starting and moving the threads may have taught
  CHECK(fusedrnn::undisturbed_threads(4) == 4, "a thread is left out at once");
  late(milliseconds(20));
  CHECK(fusedrnn::undisturbed_threads(4) == 3, "%d of 4 threads", fusedrnn::undisturbed_threads(4));
  CHECK(fusedrnn::undisturbed_threads(1) == 1, "%d of 1 thread", fusedrnn::undisturbed_threads(1));
  std::this_thread::sleep_for(milliseconds(60));
  CHECK(fusedrnn::undisturbed_threads(4) == 4, "not all are tried again");
  late(milliseconds(20));
  const auto begin = std::chrono::steady_clock::now();
  std::this_thread::sleep_for(milliseconds(60));
  const int left_out = fusedrnn::threads_left_out();
  // Unless this thread has overslept the second pause too.
  if (std::chrono::steady_clock::now() - begin < milliseconds(90))
    CHECK(left_out == 1, "the second pause is no longer than the first");
}

// Some threads for the runtime to remember, as another user of it would leave.
void use_openmp_elsewhere() {
  std::atomic<int> seen{0};
#pragma omp parallel num_threads(3)
  ++seen;
  CHECK(seen == 3, "the OpenMP runtime gives %d threads", seen.load());
}

}  // namespace

int main() {
  omp_set_dynamic(0);
  use_openmp_elsewhere();
  test_fork("before the first team");
  test_disturbance();  // before teams that are larger than the machine disturb themselves
  for (int threads = 1; threads <= 4; ++threads) {
    const int size = team_size(threads);
    CHECK(size == threads, "a team of %d, not %d", size, threads);
    test_order(threads);
  }
  test_nesting();
  test_fork("after some teams");
  const int size = team_size(3);
  CHECK(size == 3, "a team of %d after a fork", size);
  return check::result();
}
