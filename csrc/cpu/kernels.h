// The table of compiled kernels and the choice among instruction sets.
#pragma once

#include "layer.h"

namespace fusedrnn {

template <class T>
struct Functions {
  void (*forward)(const Forward<T>&, int threads);
  void (*backward)(const Backward<T>&, int threads);
};

// One instruction set's kernels.
struct Kernels {
  const char* name;
  bool (*runs_here)();
  Functions<float> single_[static_cast<int>(CellKind::count)];
  Functions<double> double_[static_cast<int>(CellKind::count)];
};

extern const Kernels avx512_kernels, avx2_kernels, baseline_kernels;

// Facts of a cell that callers need to size what they pass.
struct CellFacts {
  const char* name;
  int gates, states, kept;
};
extern const CellFacts cell_facts[static_cast<int>(CellKind::count)];

// The instruction sets compiled in that this processor runs, best first; ends with null.
const Kernels* const* available_kernels();

// The one in use: the best available, or the one named by the environment variable FUSEDRNN_ISA at first use, or by
// `use_kernels`. Null if FUSEDRNN_ISA names none that is available.
const Kernels* kernels_in_use();
bool use_kernels(const char* name);

}  // namespace fusedrnn
