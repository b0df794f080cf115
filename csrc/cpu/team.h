// Threads: one parallel region per call, on the OpenMP runtime that torch has loaded, with a barrier of our own.
#pragma once

#include <atomic>
#include <cstdint>

namespace fusedrnn {

// A barrier that spins briefly and then yields: libgomp's own costs several times more, and one that only spins
// stalls for a whole time slice whenever another process holds a core.
//
// Threads that have been started or woken on one core may stay there together for 10 ms and more while another is idle.
// So when the one that was waited for finds that the waiter yields on its own core, who waits next on that core does
// not spin before it yields. The first call after a sleep (Zen 4, LSTM inference 100,1,256,256, 2 threads): 10 ms -> 2
// ms. To sleep instead of yielding does not part them sooner.
class Barrier {
 public:
  void wait(int size);
  // Nanoseconds that threads have yielded, all together.
  int64_t waited() const { return waited_.load(std::memory_order_relaxed); }
  // Whether a thread yielded to one on its own core.
  bool saw_shared_core() const { return saw_shared_core_.load(std::memory_order_relaxed); }

 private:
  std::atomic<int64_t> waited_{0};
  std::atomic<int> yields_on_{-1}, shared_core_{-1};  // cores, or -1
  std::atomic<bool> saw_shared_core_{false};
  // Of all meetings: who waits looks at what the last one changes anyway. With a second number that the last one then
  // changes, news pass between cores once more (Zen 4, two cores: 75 and 55 ns, or 300 and 210, see meeting_cost).
  alignas(64) std::atomic<int64_t> arrivals_{0};
};

// One thread's place in the team that runs a region.
struct Team {
  int rank, size;
  Barrier* barrier;
  inline __attribute__((always_inline)) void sync() const {
    if (size > 1) barrier->wait(size);
  }
};

// Calls work(context, team) on up to `threads` threads at once and returns when all have returned. The team may be
// smaller than asked for: inside another parallel region, in a forked child (whose inherited OpenMP runtime would
// hang), or when no OpenMP runtime is loaded. `work` must not throw.
void run_team(int threads, void (*work)(void* context, const Team& team), void* context);

// How many of `threads` threads have a core to themselves, as far as the last regions tell: one whose threads waited
// for one of them 2.5 ms, and longer than it would have taken them to do its work, shows that another process keeps a
// core busy, and that thread has only its turns there. Then there is one thread less for 50 ms (10 ms if they have just
// slept), for twice as long each time that all are tried again in vain, up to a second. For work whose results do not
// depend on the number of threads.
int undisturbed_threads(int threads);

// How many it would leave out now.
int threads_left_out();

// What it costs now that all threads of a team meet at its barrier, in nanoseconds: on a guest, whose cores the host
// moves about, 75 for seconds and then 300 (Zen 4, two cores; 45 and 200 with Zen 5). It is measured by a team of which
// all call measure_meetings at the same time, and known for a while then; as long as it is not, it is taken to be low.
double meeting_cost();
bool meeting_cost_is_known();

// Whether the next team should measure it. It stays unknown while threads that have just slept share a core.
bool should_measure_meetings();
void measure_meetings(const Team& team);

// For tests: it costs so much from now on, or what is measured again if that is not positive.
void assume_meeting_cost(double nanoseconds);

}  // namespace fusedrnn
