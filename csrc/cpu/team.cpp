#include "team.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <chrono>

namespace fusedrnn {
namespace {

int64_t nanoseconds() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// The larger of what an atomic holds and a value, in its place.
void raise(std::atomic<int64_t>& highest, int64_t value) {
  int64_t before = highest.load(std::memory_order_relaxed);
  while (before < value && !highest.compare_exchange_weak(before, value, std::memory_order_relaxed)) {
  }
}

// The core that this thread runs on; -1 if unknown.
int current_core() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

// Moves this thread off a core, if it may run on as many as there are threads. It may go back there as soon as it has
// been moved.
void leave([[maybe_unused]] int core, [[maybe_unused]] int threads) {
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0 || CPU_COUNT(&allowed) < threads) return;
  cpu_set_t others = allowed;
  CPU_CLR(static_cast<size_t>(core), &others);
  if (sched_setaffinity(0, sizeof others, &others) == 0) sched_setaffinity(0, sizeof allowed, &allowed);
#endif
}

}  // namespace

void Barrier::wait(int size) {
  const int64_t before = arrivals_.fetch_add(1), all = (before / size + 1) * size;
  if (before + 1 == all) {
    if (const int core = yields_on_.load(std::memory_order_relaxed); core >= 0) {
      yields_on_.store(-1, std::memory_order_relaxed);
      const bool same = core == current_core();
      shared_core_.store(same ? core : -1, std::memory_order_relaxed);
      if (same) saw_shared_core_.store(true, std::memory_order_relaxed);
    }
    return;
  }
  const auto arrived = [&] { return arrivals_.load() >= all; };
  const int shared = shared_core_.load(std::memory_order_relaxed);
  if (shared < 0 || shared != current_core())
    for (int spins = 0; spins < 2000; ++spins) {
      if (arrived()) return;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  const int64_t begin = nanoseconds();
  yields_on_.store(current_core(), std::memory_order_relaxed);
  while (!arrived()) sched_yield();
  waited_.fetch_add(nanoseconds() - begin, std::memory_order_relaxed);
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
  std::atomic<int> members{0};                           // perhaps fewer than asked for
  std::atomic<int64_t> end{INT64_MIN}, sum_of_times{0};  // from `begin` to each member's own end
  std::atomic<int> last_core{-1};
  std::atomic<bool> ends_on_shared_core{false};
  const int first_core = current_core();  // where the calling thread was
  int64_t begin = nanoseconds();
};

void run_member(void* data) {
  Region& region = *static_cast<Region*>(data);
  const Team team{region.openmp->thread_num(), region.openmp->num_threads(), &region.barrier};
  // A thread that has slept may be woken on the core of the one that woke it, where they stay together for up to 12 ms
  // in a guest whose kernel packs them, while another is idle. (Zen 5, 2 threads, inference, single calls 20 ms after
  // each other: LSTM 100,16,200,200 4.4 -> 2.9 ms; 100,1,256,256 1.07 -> 0.54; three 100 ms after others 4.7 -> 2.5,
  // 1.04 -> 0.65.)
  if (team.rank > 0 && region.first_core >= 0 && current_core() == region.first_core)
    leave(region.first_core, team.size);
  region.work(region.context, team);
  const int64_t now = nanoseconds();
  ++region.members;
  if (const int core = current_core(); core >= 0 && region.last_core.exchange(core) == core)
    region.ends_on_shared_core = true;
  raise(region.end, now);
  region.sum_of_times.fetch_add(now - region.begin, std::memory_order_relaxed);
}

// What undisturbed_threads knows: how many threads are held back, how many the last call that asked was given, and
// until when, after a pause of what length. Calls from several threads at once may mix their updates, which costs some
// time.
std::atomic<int> held_back{0}, given{0};
std::atomic<int64_t> until{0}, pause{0};
constexpr int64_t ms = 1000000, shortest_pause = 50 * ms, longest_pause = 1000 * ms;
// Another process' turn lasts 3 or 4 ms at least; once one has shown itself, shorter waits count too. Between its turns
// it may be away for some milliseconds.
constexpr int64_t shortest_turn = 5 * ms / 2, longest_absence = 20 * ms;

// `wait`: how long each of the others waited for one of them, in a region of `total`. Others' cores may also be slower
// than this one's, by less than it pays to do their work too: without the one that is waited for, the region would have
// taken (total - wait) * threads / (threads - 1).
void learn(int threads, int64_t wait, int64_t total, int64_t least_pause) {
  const bool disturbed = wait > (held_back > 0 ? ms : shortest_turn) && wait > total / threads;
  if (!disturbed && held_back == 0) return;
  const int64_t now = nanoseconds();
  const bool holding_back = held_back > 0 && now < until;
  if (!disturbed) {
    if (now > until + longest_absence) held_back = 0;  // all were tried again, and none was in the way
  } else if (!holding_back) {
    pause = std::min(std::max(held_back > 0 ? 2 * pause.load() : 0, least_pause), longest_pause);
    held_back = std::max(1, held_back.load());
    until = now + pause;
  } else if (threads <= given) {
    ++held_back;  // one less was not enough
  }
}

// Threads that have slept may be on one core in spite of that, and stay there together for some milliseconds. Who calls
// once in a while is then better off without them, as if the core were busy; who goes on calling is not. So they are
// left out for a short while, and when they are tried again amidst work, they get the time to part.
constexpr int64_t shortest_sleep = 2 * ms, longest_parting = 15 * ms, pause_to_part = 10 * ms;
// Since when the threads of teams have not slept, and since when calls have followed each other, whoever ran them.
std::atomic<int64_t> last_team_end{INT64_MIN / 2}, awake_since{0}, last_call_end{INT64_MIN / 2}, busy_since{0};

// Whether the threads of a region that begins now must be woken, or have been not long ago.
bool just_awake(int64_t now) { return now > last_team_end + shortest_sleep || now < awake_since + longest_parting; }

}  // namespace

void run_team(int threads, void (*work)(void*, const Team&), void* context) {
  static const OpenMp openmp;
  Region region{work, context, &openmp, {}};
  const bool alone = threads < 2 || !openmp.usable();
  if ((!alone || held_back > 0) && region.begin > last_call_end + shortest_sleep) busy_since = region.begin;
  if (alone) {
    work(context, Team{0, 1, &region.barrier});
    if (held_back > 0) last_call_end = nanoseconds();
    return;
  }
  const bool awoke = just_awake(region.begin);
  if (region.begin > last_team_end + shortest_sleep) awake_since = region.begin;
  openmp.parallel(run_member, &region, static_cast<unsigned>(threads), 0);
  last_team_end = last_call_end = region.end.load();
  const int members = region.members;
  if (members < 2) return;
  const int64_t total = region.end - region.begin;
  // One that has lost its turn at a barrier, where all are already, counts as waiting beside those it keeps waiting.
  const int64_t waited = members * total - region.sum_of_times + region.barrier.waited();
  const bool parting = awoke && (region.barrier.saw_shared_core() || region.ends_on_shared_core);
  if (parting && held_back > 0 && region.begin > busy_since + longest_parting) return;
  learn(members, std::min(waited / (members - 1), total), total, parting ? pause_to_part : shortest_pause);
}

namespace {

constexpr double lowest_cost = 50;
std::atomic<double> latest_cost{lowest_cost};
std::atomic<int64_t> holds_until{INT64_MIN};

}  // namespace

bool meeting_cost_is_known() { return nanoseconds() <= holds_until; }

double meeting_cost() { return meeting_cost_is_known() ? latest_cost.load() : lowest_cost; }

bool should_measure_meetings() { return !meeting_cost_is_known(); }

void measure_meetings(const Team& team) {
  // In pairs: who comes last at one sees less of it, but then more of the next. The least of them may be luck: of cores
  // that meet in 200 ns some do in 120.
  constexpr int pairs = 9;
  constexpr double far = 150, on_one_core = 1000;
  int64_t took[pairs];
  team.sync();
  int64_t before = nanoseconds();
  for (int64_t& pair : took) {
    team.sync();
    team.sync();
    const int64_t now = nanoseconds();
    pair = now - before;
    before = now;
  }
  if (team.rank != 0) return;
  std::nth_element(took, took + pairs / 2, took + pairs);
  const double cost = static_cast<double>(took[pairs / 2]) / 2;
  if (cost > on_one_core) return;
  latest_cost = cost;
  // To find out that cores are still far apart costs a call that is divided in vain, and its weights packed for that.
  holds_until = before + (cost > far ? 200 : 20) * ms;
}

void assume_meeting_cost(double nanoseconds) {
  latest_cost = nanoseconds;
  holds_until = nanoseconds > 0 ? INT64_MAX : INT64_MIN;
}

int threads_left_out() { return held_back > 0 && nanoseconds() < until ? held_back.load() : 0; }

int undisturbed_threads(int threads) { return given = std::max(1, threads - threads_left_out()); }

}  // namespace fusedrnn
