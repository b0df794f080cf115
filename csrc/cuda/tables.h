// The kernels of one arithmetic. Each arithmetic has a file that includes this, and fills its table.
#pragma once

#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../cells/rnn.h"
#include "recurrence.h"
#include "step.h"

namespace fusedrnn::cuda {

template <class Cell, class A>
constexpr CellKernels kernels_of() {
  using F = ForwardPass<Cell, A>;
  using B = BackwardPass<Cell, A>;
  CellKernels k{};
  if constexpr (A::kind != Arithmetic::f64) {  // twice the registers would not leave enough of them for weights
    k.one_cta[0] = persistent<F, OneCta>, k.one_cta[1] = persistent<B, OneCta>;
    k.grid[int(Exchange::counter)][0] = persistent<F, Counter>,
    k.grid[int(Exchange::counter)][1] = persistent<B, Counter>;
    k.grid[int(Exchange::flags)][0] = persistent<F, Flags>, k.grid[int(Exchange::flags)][1] = persistent<B, Flags>;
  }
  k.start[0] = start<F>, k.start[1] = start<B>;
  k.step[0] = step<F>, k.step[1] = step<B>;
  return k;
}

// In the order of CellKind.
#define FUSEDRNN_KERNELS(A) \
  {kernels_of<RnnTanh, A>(), kernels_of<RnnRelu, A>(), kernels_of<Lstm, A>(), kernels_of<Gru, A>()}

}  // namespace fusedrnn::cuda
