// What a cell is, for every engine.
//
// A cell is a struct of constants and functions, forward in two halves and backward, for one hidden unit at one time
// step. It has no loops over units and no memory: an engine's time loop loads the arguments and stores the results. M
// is the engine's arithmetic: M::V is a few SIMD vectors of units on the CPU and a float on a GPU; it has + - * / and
// the functions M::sigmoid, tanh, relu, where_positive, multiply_add and zero. The constants tell the loop what the
// cell needs:
//
//   gates            row blocks of W_ih and W_hh, in torch's order
//   states           values carried from step to step; the first is the output h
//   slots            gradients per unit that backward produces: those of the input products W_ih x + b_ih lie in the
//                    first `gates` slots, those of the recurrent products W_hh h + b_hh in the last `gates` slots,
//                    so either set is one contiguous block for the multiplications that follow
//   input_slot[g]    the slot of gate g's input product
//   recurrent_slot[g]  the slot of gate g's recurrent product; equal to input_slot[g] where only their sum matters
//   kept             values per unit that forward leaves for backward, in the places of the slots, either 0 or `slots`
//
//   activate(x, r, keep)                        x, r: input and recurrent products per gate; keep: `slots` values
//   advance(keep, prev, next)                   prev, next: states; keep: then complete
//   backward(keep, prev, next, dnext, dprev, d) dnext: gradient of the new states; dprev: gradient of the previous
//                                               states except through the products; d: gradients per slot
//
// The second half waits for the first, of the same unit alone: so a loop can run each for many units, and the processor
// computes side by side what is a chain of a hundred cycles for each of them.
#pragma once

#ifdef __CUDACC__
#define FUSEDRNN_CELL __host__ __device__ static inline
#else
#define FUSEDRNN_CELL static inline __attribute__((always_inline))
#endif

namespace fusedrnn {
enum class CellKind { rnn_tanh, rnn_relu, lstm, gru, count };
}
