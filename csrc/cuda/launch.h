// The recurrence of one layer on a GPU, as the rest of the program sees it: what there is to compute, how it is divided
// (Plan), and the two calls. Needs no CUDA header and no Python.
//
// T steps, B sequences, H hidden units, D directions, G the cell's gates. A *token* is one (step, sequence) pair. The
// products that do not depend on time are not made here: the caller brings x W_ih^T + b_ih and turns the gradients of
// the gates into those of weights and input.
//
// All pointers are to device memory, contiguous unless strides are given. *Value* is the caller's dtype; *Real*, in
// which gates and carried states are computed, is float, or double for double.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "../cells/cell.h"

namespace fusedrnn::cuda {

constexpr int max_states = 2, max_directions = 2;

// How products are made: f32 by multiply-adds in full precision, tf32, bf16 and f16 on tensor cores with float sums.
enum class Arithmetic { f32, tf32, bf16, f16, f64, count };

// automatic is a wish only.
//   one_cta   one CTA holds all weights; h stays in its shared memory; sequences are divided among CTAs
//   grid      several CTAs hold the weights and hand h to each other through the L2 cache; all run at once
//   per_step  one launch per step, which reads the weights anew
enum class Path { automatic, one_cta, grid, per_step };

// How the CTAs of a grid know that what they read of each other is there.
//   counter  each adds one to a counter when its part of a step is written, and waits for all
//   flags    what is not there is a pattern that no value has; no barrier (exchange.h)
// Which is faster only a GPU can tell.
enum class Exchange { counter, flags };

// What a plan depends on.
struct Sizes {
  CellKind cell;
  Arithmetic arithmetic;
  bool backward;
  int64_t T, B, H;
  int directions;
};

// What the caller insists on; zeros leave the choice to make_plan.
struct Wish {
  Path path;
  int row_groups, k_groups;  // as in Plan
  int slice;
  Exchange exchange;
};

struct Plan {
  Path path;
  Exchange exchange;         // of a grid
  int row_groups, k_groups;  // warps of a CTA: these divide its gate rows, those what is summed over
  int units;                 // hidden units of a CTA
  int unit_blocks;           // CTAs that share the hidden units
  int slice, slices;         // sequences of a CTA, CTAs that share the sequences
  int directions_at_once;    // directions in one launch
  int blocks;                // blocks of 64 bytes in what is summed over
  int shared_blocks;         // of each warp's blocks of weights those in shared memory; the first ones are in registers
  int64_t shared_bytes;      // dynamic shared memory of a CTA
  int64_t scratch_bytes;     // device memory that the caller brings
  std::string why;           // one line for explain()
};

// Which tokens exist, where rows restart, and what is dropped of the states on their way from step to step.
//
// Zoneout is that of csrc/cpu/layer.h and draws the same lots. A lot, 24 bits, is below rate * 2^24 if it is below the
// next integer, and so the kernels compare integers.
struct Sequence {
  int64_t T, B, H, tokens;
  int directions;
  const int64_t* starts;   // packed: (T + 1), tokens before step t, active sequences first; dense: null
  const int64_t* lengths;  // dense: (B), or null where every sequence has T steps. Behind them the output is zero
  const uint8_t* resets;   // (T, B), or null: nothing passes from step t - 1 to step t, nor back, where it is not zero
  const void* h_mask;      // Value (D, B, H): factors of h on its way into the products; or null for ones
  double zoneout[max_states];        // the rate of each state, or zeros
  uint32_t stays_below[max_states];  // 2^24 times the rate, rounded up
  const uint64_t* seed;              // of the lots, in device memory; or null for their expectation
};

struct Forward : Sequence {
  const void* gates_x;               // Value (D, tokens, G, H): x W_ih^T + b_ih
  const void* w_hh[max_directions];  // Value (G*H, w_stride), zero in columns H and after
  const void* b_hh[max_directions];  // Value (G*H), or null
  const void* initial[max_states];   // Value (D, B, H), or null for zeros
  int64_t w_stride;                  // in values; in bytes a multiple of 64
  void* output;                      // Value, row (t, b) at t * output_step + b * output_row, packed token *
  int64_t output_step, output_row;   // output_row; direction d at d * H in it
  void* final[max_states];           // Value (D, B, H)
  void* kept;                        // Value (D, tokens, kept, H) for backward, or null
  void* cells;                       // Real (D, tokens, H): the second state for backward, or null
  void* computed;                    // Real (D, tokens, states, H): of zoneout what the cell computed, or null
};

struct Backward : Sequence {
  const void* w_hh_t[max_directions];  // Value (H, w_stride), zero in columns G*H and after
  const void* initial[max_states];     // Value (D, B, H), or null for zeros
  int64_t w_stride;                    // in values; in bytes a multiple of 64
  const void* output;                  // as in Forward
  int64_t output_step, output_row;
  const void* kept;
  const void* cells;
  const void* computed;  // null without zoneout
  const void* d_output;  // Value, laid out by strides of its own, or null for zeros
  int64_t d_output_step, d_output_row;
  const void* d_final[max_states];  // Value (D, B, H), or null for zeros
  void* d_slots;                    // Value (D, tokens, slots, H)
  void* d_initial[max_states];      // Value (D, B, H)
};

// What must be known of a cell to lay out the arrays above.
struct CellFacts {
  const char* name;
  int gates, states, slots, kept;
  int input_slot[4];  // by gate; the slots of the recurrent products are the last ones, in the order of the gates
};
extern const CellFacts cell_facts[static_cast<int>(CellKind::count)];

// A GPU. `cooperative` tells whether it can run all CTAs of a launch at once.
struct DeviceFacts {
  std::string name;
  int major, minor;
  int processors;
  int64_t shared_bytes;  // at most, for one CTA
  bool cooperative;
};

using Stream = void*;  // a cudaStream_t

// The GPU would not run all CTAs of a launch at once, though the plan expected it: somebody may have set processors
// apart. The path per_step does not need that.
struct LaunchRefused : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// All functions throw std::runtime_error with what went wrong; the GPU stays usable.
int device_count();
DeviceFacts device_facts(int device);
int runtime_version();
int driver_version();
Plan make_plan(const Sizes& sizes, const Wish& wish, int device);
void forward(const Forward& problem, const Sizes& sizes, const Plan& plan, void* scratch, int device, Stream stream);
void backward(const Backward& problem, const Sizes& sizes, const Plan& plan, void* scratch, int device, Stream stream);

}  // namespace fusedrnn::cuda
