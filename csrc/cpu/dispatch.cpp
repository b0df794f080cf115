// Which instruction set's kernels run: the best that the processor has, or the one that was asked for.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../cells/rnn.h"
#include "kernels.h"

namespace fusedrnn {

const CellFacts cell_facts[] = {{"rnn_tanh", RnnTanh::gates, RnnTanh::states, RnnTanh::kept},
                                {"rnn_relu", RnnRelu::gates, RnnRelu::states, RnnRelu::kept},
                                {"lstm", Lstm::gates, Lstm::states, Lstm::kept},
                                {"gru", Gru::gates, Gru::states, Gru::kept}};

namespace {

const Kernels* const compiled[] = {
#if defined(__x86_64__)
    &avx512bf16_kernels, &avx512_kernels, &avx2_kernels,
#endif
    &baseline_kernels};

constexpr int count = sizeof(compiled) / sizeof(compiled[0]);

struct Available {
  const Kernels* list[count + 1] = {};
  Available() {
    int n = 0;
    for (const Kernels* kernels : compiled)
      if (kernels->runs_here()) list[n++] = kernels;
  }
  const Kernels* find(const char* name) const {
    for (const Kernels* const* k = list; *k; ++k)
      if (std::strcmp((*k)->name, name) == 0) return *k;
    return nullptr;
  }
};

const Available& available() {
  static const Available result;
  return result;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels* const* available_kernels() { return available().list; }

const Kernels* kernels_in_use() {
  if (const Kernels* kernels = chosen.load(std::memory_order_relaxed)) return kernels;
  const char* wanted = std::getenv("FUSEDRNN_ISA");
  const Kernels* kernels = wanted && *wanted ? available().find(wanted) : available().list[0];
  chosen.store(kernels, std::memory_order_relaxed);
  return kernels;
}

bool use_kernels(const char* name) {
  const Kernels* kernels = available().find(name);
  if (kernels) chosen.store(kernels, std::memory_order_relaxed);
  return kernels != nullptr;
}

}  // namespace fusedrnn
