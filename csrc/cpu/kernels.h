// The table of compiled kernels and the choice among instruction sets.
#pragma once

#include "layer.h"

namespace fusedrnn {

template <class T>
struct Functions {
  void (*forward)(const Forward<T>&, int threads);
  void (*backward)(const Backward<T>&, int threads);
};

// How fast an instruction set is at best, see probe.h: each does its work a number of rounds.
struct Probes {
  int64_t (*multiply_adds_single)(int64_t rounds);  // returns floating-point operations, as the next two do
  int64_t (*multiply_adds_double)(int64_t rounds);
  int64_t (*dots_bf16)(int64_t rounds);  // null where there is no instruction for it
  void (*read)(const void* data, int64_t bytes, int64_t rounds);
};

// One instruction set's kernels.
struct Kernels {
  const char* name;
  bool (*runs_here)();
  const Functions<float>* single_;  // of each cell, as the next two
  const Functions<double>* double_;
  const Functions<bf16>* bf16_;
  Probes probes;
};

extern const Kernels avx512bf16_kernels, avx512_kernels, avx2_kernels, baseline_kernels;

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
