#include <sys/mman.h>

#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <unordered_map>
#include <vector>

#include "../../csrc/cuda/device.h"
#include "../../csrc/cuda/kernels.h"

#if !defined(__x86_64__) || defined(FUSEDRNN_PORTABLE_FIBERS)
#include <ucontext.h>
#endif

namespace fusedrnn::emulator {
namespace {

// A place to continue at. By hand, or with FUSEDRNN_PORTABLE_FIBERS and elsewhere by ucontext, which is slower because
// it asks the kernel at each switch.
#if defined(__x86_64__) && !defined(FUSEDRNN_PORTABLE_FIBERS)
struct Context {
  void* stack;
};
extern "C" void fusedrnn_switch(void** from, void* to);
asm(R"(
.text
.type fusedrnn_switch, @function
fusedrnn_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
void switch_to(Context& from, Context& to) { fusedrnn_switch(&from.stack, to.stack); }
void prepare(Context& context, char* stack, size_t size, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + size);  // aligned as at a function's first instruction after the return
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.stack = top;
}
#else
using Context = ucontext_t;
void switch_to(Context& from, Context& to) { swapcontext(&from, &to); }
void prepare(Context& context, char* stack, size_t size, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = size;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

constexpr size_t stack_bytes = 128 << 10, guard_bytes = 4096;

// Stacks stay for the next launch. Below each is a page that nobody may touch.
class Stacks {
 public:
  char* get(size_t i) {
    while (stacks_.size() <= i) {
      void* p = mmap(nullptr, stack_bytes + guard_bytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (p == MAP_FAILED || mprotect(p, guard_bytes, PROT_NONE)) throw std::runtime_error("emulator: no stack");
      stacks_.push_back(static_cast<char*>(p) + guard_bytes);
    }
    return stacks_[i];
  }

 private:
  std::vector<char*> stacks_;
};

// When a thread did something: its number and its own time. Another thread knows of it if its clock has come as far.
struct Moment {
  uint32_t thread, time;
};
using Clock = std::vector<uint32_t>;

void join(Clock& into, const Clock& from) {
  if (into.size() < from.size()) into.resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}

// What is known of two bytes of memory.
struct Cell {
  Moment written{}, read{};                          // time 0: never
  std::unique_ptr<std::vector<Moment>> other_reads;  // reads that `read` does not know of
  bool initialised = false, pending = false;
};

struct Copy {
  char* to;
  const char* from;
};

struct Fiber {
  Context context{};
  uint32_t number = 0;
  int64_t cta = 0;
  int index = 0;
  bool done = false, waiting = false;
  Site waits_in{};
  std::shared_ptr<const Clock> known;   // shared by threads that met and learnt nothing since
  std::shared_ptr<const Clock> fenced;  // what it knew at its last fence: comes with what it puts
  Clock read;                           // came with what it read: known from its next fence on
  uint32_t time = 1;
  int64_t calls = 0;  // of the primitive that the tests break
  std::vector<std::vector<Copy>> copies;
};

struct Warp {
  Site site{};
  void* posts[32];
  Fiber* fibers[32];
  int arrived = 0;
};

struct Cta {
  std::vector<char> shared;
  std::vector<Cell> cells;
  std::vector<Warp> warps;
  std::vector<Fiber*> at_barrier;
  Site barrier{};
};

struct Counter {
  Clock clock;
  std::vector<std::pair<Fiber*, unsigned>> waiters;
};

// What is known of a place that a value is put into.
struct Place {
  std::shared_ptr<const Clock> comes_with;  // what the writer's last fence released
  Moment emptied{};
  std::vector<Moment> reads;  // since then
  bool has_value = false;
};

struct Page {
  Cell cells[2048];
};

// One launch.
struct Machine {
  int threads = 0;
  const std::function<void()>* kernel = nullptr;
  std::vector<Fiber> fibers;
  std::vector<Cta> ctas;
  std::map<const unsigned*, Counter> counters;
  std::unordered_map<const void*, Place> places;
  std::unordered_map<uintptr_t, std::vector<Fiber*>> at_empty;  // who waits for a place of these 16 bytes
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
  uintptr_t last_page = 0;
  Page* last = nullptr;
  Context scheduler{};
  Fiber* current = nullptr;
  std::string error;
  std::deque<Fiber*> ready, ready_ahead;
  std::mt19937_64 random;

  void make_ready(Fiber* f) {
    f->waiting = false;
    const bool ahead = settings().schedule == Schedule::ahead &&
                       f->cta == static_cast<int64_t>(settings().seed % static_cast<uint64_t>(ctas.size()));
    (ahead ? ready_ahead : ready).push_back(f);
  }

  Fiber* next() {
    std::deque<Fiber*>& from = ready_ahead.empty() ? ready : ready_ahead;
    if (from.empty()) return nullptr;
    if (settings().schedule == Schedule::random) std::swap(from.front(), from[random() % from.size()]);
    Fiber* f = settings().schedule == Schedule::reversed ? from.back() : from.front();
    settings().schedule == Schedule::reversed ? from.pop_back() : from.pop_front();
    return f;
  }

  // The current thread stops until make_ready is called for it.
  void wait(const Site& site) {
    current->waiting = true;
    current->waits_in = site;
    switch_to(current->context, scheduler);
  }

  Cta& cta() { return ctas[static_cast<size_t>(current->cta)]; }

  bool knows(const Moment& m) const {
    return m.time == 0 || m.thread == current->number || m.time <= (*current->known)[m.thread];
  }
  Moment now() const { return {current->number, current->time}; }

  // Everyone who meets learns what any of them knows.
  template <class Range>
  void meet(const Range& all) {
    auto together = std::make_shared<Clock>(*all[0]->known);
    const Clock* joined = all[0]->known.get();
    for (Fiber* f : all) {
      if (f->known.get() != joined) join(*together, *f->known), joined = f->known.get();
      (*together)[f->number] = f->time;
    }
    for (Fiber* f : all) f->known = together, ++f->time;
  }

  Cell* cells_of(const void* p) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(p), page = at >> 12;
    if (page != last_page || !last) {
      auto& entry = pages[page];
      if (!entry) entry = std::make_unique<Page>();
      last_page = page, last = entry.get();
    }
    return &last->cells[(at & 4095) >> 1];
  }

  std::string name(const Moment& m) const {
    const Fiber& f = fibers[m.thread];
    return "CTA " + std::to_string(f.cta) + " thread " + std::to_string(f.index);
  }

  void touch(Cell& cell, bool write, const char* where, const Site& site) {
    if (!knows(cell.written))
      fail(std::string("race: ") + (write ? "writes" : "reads") + " " + where + " memory that " + name(cell.written) +
               " wrote, without a barrier between",
           site);
    if (write) {
      if (!knows(cell.read))
        fail(std::string("race: overwrites ") + where + " memory that " + name(cell.read) +
                 " read, without a barrier between",
             site);
      if (cell.other_reads) {
        for (const Moment& m : *cell.other_reads)
          if (!knows(m))
            fail(std::string("race: overwrites ") + where + " memory that " + name(m) +
                     " read, without a barrier between",
                 site);
        cell.other_reads.reset();
      }
      cell.written = now(), cell.read = {};
      cell.initialised = true;
    } else if (knows(cell.read)) {
      cell.read = now();
    } else {
      if (!cell.other_reads) cell.other_reads = std::make_unique<std::vector<Moment>>();
      for (Moment& m : *cell.other_reads)
        if (knows(m)) {
          m = now();
          return;
        }
      cell.other_reads->push_back(now());
    }
  }
};

Machine* machine = nullptr;

void run_fiber() {
  Machine& m = *machine;
  try {
    (*m.kernel)();
  } catch (const std::exception& e) {
    if (m.error.empty()) m.error = e.what();
  }
  m.current->done = true;
  switch_to(m.current->context, m.scheduler);
}

std::string at(const Site& site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(site.operation) + " at " + (slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

std::string who_waits(const Machine& m) {
  std::map<std::string, std::pair<std::string, int>> groups;
  for (const Fiber& f : m.fibers) {
    const std::string what = "CTA " + std::to_string(f.cta) + ": " +
                             (f.done      ? "ended"
                              : f.waiting ? "in " + at(f.waits_in)
                                          : "ready");
    auto& group = groups[what];
    if (!group.second++) group.first = std::to_string(f.index);
  }
  std::string text;
  for (const auto& [what, group] : groups)
    text += "\n  " + what + ": " + std::to_string(group.second) + " threads, first " + group.first;
  return text;
}

}  // namespace

Settings& settings() {
  static Settings value;
  return value;
}

void fail(const std::string& what, const Site& site) {
  const Fiber& f = *machine->current;
  throw std::runtime_error("emulator: " + what + " (CTA " + std::to_string(f.cta) + " thread " +
                           std::to_string(f.index) + ", " + at(site) + ")");
}

void launch(int64_t ctas, int threads, int64_t shared_bytes, const std::function<void()>& kernel) {
  static Stacks stacks;
  Machine m;
  machine = &m;
  m.threads = threads;
  m.kernel = &kernel;
  m.random.seed(settings().seed);
  m.fibers = std::vector<Fiber>(static_cast<size_t>(ctas * threads));
  m.ctas = std::vector<Cta>(static_cast<size_t>(ctas));
  const auto nothing = std::make_shared<const Clock>(m.fibers.size());
  for (Cta& cta : m.ctas) {
    cta.shared.assign(static_cast<size_t>(shared_bytes), static_cast<char>(0xff));  // NaN in every format
    cta.cells = std::vector<Cell>(static_cast<size_t>(shared_bytes / 2 + 1));
    cta.warps.resize(static_cast<size_t>((threads + 31) / 32));
  }
  for (size_t i = 0; i < m.fibers.size(); ++i) {
    Fiber& f = m.fibers[i];
    f.number = static_cast<uint32_t>(i);
    f.cta = static_cast<int64_t>(i) / threads;
    f.index = static_cast<int>(static_cast<int64_t>(i) % threads);
    f.known = nothing;
    prepare(f.context, stacks.get(i), stack_bytes, run_fiber);
    m.make_ready(&f);
  }
  while (m.error.empty()) {
    m.current = m.next();
    if (!m.current) break;
    switch_to(m.scheduler, m.current->context);
  }
  const bool all_done = std::all_of(m.fibers.begin(), m.fibers.end(), [](const Fiber& f) { return f.done; });
  if (m.error.empty() && !all_done) m.error = "emulator: deadlock, nobody can go on" + who_waits(m);
  machine = nullptr;
  if (!m.error.empty()) throw std::runtime_error(m.error);
}

int thread_index() { return machine->current->index; }
int thread_count() { return machine->threads; }
int cta_index() { return static_cast<int>(machine->current->cta); }

bool faulty(Fault kind) {
  if (settings().fault != kind) return false;
  const int64_t call = machine->current->calls++;
  return settings().fault_at < 0 || settings().fault_at == call;
}

void access_global(const void* p, size_t bytes, bool write, const Site& site) {
  Cell* cells = machine->cells_of(p);
  for (size_t i = 0; i < (bytes + 1) / 2; ++i) machine->touch(cells[i], write, "global", site);
}

char* shared_memory(int64_t offset, size_t bytes, size_t alignment, const Site& site) {
  std::vector<char>& shared = machine->cta().shared;
  if (offset < 0 || static_cast<size_t>(offset) + bytes > shared.size())
    fail("the CTA has only " + std::to_string(shared.size()) + " bytes of shared memory", site);
  if (static_cast<size_t>(offset) % alignment) fail("misaligned", site);
  return shared.data() + offset;
}

void access_shared(const void* p, size_t bytes, bool write, const Site& site) {
  Cta& cta = machine->cta();
  const size_t first = static_cast<size_t>(static_cast<const char*>(p) - cta.shared.data()) / 2;
  for (size_t i = first; i < first + (bytes + 1) / 2; ++i) {
    if (cta.cells[i].pending) fail("shared memory used before a copy to it was waited for", site);
    if (!write && !cta.cells[i].initialised) fail("shared memory read before it was written", site);
    machine->touch(cta.cells[i], write, "shared", site);
  }
}

void meet_cta(const Site& site) {
  Machine& m = *machine;
  Cta& cta = m.cta();
  if (cta.at_barrier.empty()) cta.barrier = site;
  if (cta.barrier.line != site.line || std::strcmp(cta.barrier.file, site.file) != 0)
    fail("divergence: others of the CTA are in " + at(cta.barrier), site);
  cta.at_barrier.push_back(m.current);
  if (static_cast<int>(cta.at_barrier.size()) < m.threads) return m.wait(site);
  m.meet(cta.at_barrier);
  for (Fiber* f : cta.at_barrier)
    if (f != m.current) m.make_ready(f);
  cta.at_barrier.clear();
}

void meet_warp(const Site& site, void* mine, const std::function<void(void* const*)>& all) {
  Machine& m = *machine;
  Warp& warp = m.cta().warps[static_cast<size_t>(m.current->index / 32)];
  if (warp.arrived == 0) warp.site = site;
  if (warp.site.line != site.line || std::strcmp(warp.site.file, site.file) != 0)
    fail("divergence: others of the warp are in " + at(warp.site), site);
  warp.posts[m.current->index % 32] = mine;
  warp.fibers[warp.arrived++] = m.current;
  if (warp.arrived < 32) return m.wait(site);
  all(warp.posts);
  for (Fiber* f : warp.fibers)
    if (f != m.current) m.make_ready(f);
  warp.arrived = 0;
}

void arrive(unsigned* counter, const Site&) {
  Machine& m = *machine;
  Counter& c = m.counters[counter];
  if (!faulty(Fault::arrive)) {  // broken: it adds, but does not release
    join(c.clock, *m.current->known);
    c.clock[m.current->number] = m.current->time++;
  }
  ++*counter;
  for (size_t i = c.waiters.size(); i-- > 0;)
    if (*counter >= c.waiters[i].second) {
      m.make_ready(c.waiters[i].first);
      c.waiters.erase(c.waiters.begin() + static_cast<std::ptrdiff_t>(i));
    }
}

void wait_for(const unsigned* counter, unsigned count, const Site& site) {
  Machine& m = *machine;
  Counter& c = m.counters[counter];
  if (*counter < count) {
    c.waiters.emplace_back(m.current, count);
    m.wait(site);
  }
  auto known = std::make_shared<Clock>(*m.current->known);
  join(*known, c.clock);
  m.current->known = known;
}

void fence() {
  Machine& m = *machine;
  Fiber& f = *m.current;
  auto known = std::make_shared<Clock>(*f.known);
  join(*known, f.read);
  f.read.clear();
  f.known = known;
  auto released = std::make_shared<Clock>(*known);
  (*released)[f.number] = f.time++;
  f.fenced = released;
}

namespace {
bool is_empty(const void* p, size_t size) {
  const char* bytes = static_cast<const char*>(p);
  return std::all_of(bytes, bytes + size, [](char c) { return c == static_cast<char>(cuda::empty_byte); });
}
}  // namespace

void wait_until_full(const void* p, size_t size, const Site& site) {
  Machine& m = *machine;
  Fiber& f = *m.current;
  for (const char* at = static_cast<const char*>(p); at < static_cast<const char*>(p) + sizeof(Words); at += size) {
    while (is_empty(at, size)) {
      m.at_empty[reinterpret_cast<uintptr_t>(p)].push_back(&f);
      m.wait(site);
    }
    Place& place = m.places[at];
    if (!place.has_value) fail("reads a place that was never emptied", site);
    if (!m.knows(place.emptied))
      fail("race: reads a place that " + m.name(place.emptied) +
               " emptied, without a fence between: it may still show the value before",
           site);
    if (place.comes_with) join(f.read, *place.comes_with);
    const auto mine = std::find_if(place.reads.begin(), place.reads.end(),
                                   [&](const Moment& moment) { return moment.thread == f.number; });
    if (mine == place.reads.end())
      place.reads.push_back(m.now());
    else
      *mine = m.now();
  }
}

void put(void* p, const void* value, size_t size, const Site& site) {
  Machine& m = *machine;
  Place& place = m.places[p];
  if (!is_empty(p, size)) fail("puts a value into a place that is not empty", site);
  std::memcpy(p, value, size);
  // The sign of the one NaN that means nothing.
  if (is_empty(p, size) && !faulty(Fault::put)) static_cast<unsigned char*>(p)[size - 1] = cuda::empty_byte >> 1;
  place.comes_with = m.current->fenced;
  place.has_value = true;
  const auto waiting = m.at_empty.find(reinterpret_cast<uintptr_t>(p) / sizeof(Words) * sizeof(Words));
  if (waiting == m.at_empty.end()) return;
  for (Fiber* f : waiting->second) m.make_ready(f);
  m.at_empty.erase(waiting);
}

void empty(void* p, size_t size, const Site& site) {
  Machine& m = *machine;
  Place& place = m.places[p];
  for (const Moment& moment : place.reads)
    if (!m.knows(moment)) fail("race: empties a place that " + m.name(moment) + " read, without a fence between", site);
  place.reads.clear();
  place.emptied = m.now();
  std::memset(p, cuda::empty_byte, size);
}

void copy_async(void* shared, const void* global, const Site& site) {
  Machine& m = *machine;
  access_global(global, sizeof(Words), false, site);
  access_shared(shared, sizeof(Words), true, site);
  std::memset(shared, 0xff, sizeof(Words));
  Cta& cta = m.cta();
  const size_t first = static_cast<size_t>(static_cast<char*>(shared) - cta.shared.data()) / 2;
  for (size_t i = first; i < first + sizeof(Words) / 2; ++i) cta.cells[i].pending = true;
  if (m.current->copies.empty()) m.current->copies.emplace_back();
  m.current->copies.back().push_back({static_cast<char*>(shared), static_cast<const char*>(global)});
}

void commit_copies() {
  auto& copies = machine->current->copies;
  if (copies.empty()) copies.emplace_back();
  copies.emplace_back();
}

void wait_copies(int pending) {
  Cta& cta = machine->cta();
  auto& groups = machine->current->copies;
  while (static_cast<int>(groups.size()) - 1 > pending) {  // the last group is not committed yet
    for (const Copy& copy : groups.front()) {
      std::memcpy(copy.to, copy.from, sizeof(Words));
      const size_t first = static_cast<size_t>(copy.to - cta.shared.data()) / 2;
      for (size_t i = first; i < first + sizeof(Words) / 2; ++i) {
        cta.cells[i].pending = false;
        cta.cells[i].written = machine->now();
      }
    }
    groups.erase(groups.begin());
  }
}

}  // namespace fusedrnn::emulator
