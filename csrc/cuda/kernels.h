// What host and kernels agree on: the kernels' arguments, and where to find a kernel.
#pragma once

#include "launch.h"

namespace fusedrnn::cuda {

// What is summed over is divided into blocks of 64 bytes, what the four threads of a row load at once.
constexpr int block_bytes = 64;
// Columns, that is sequences, of a tensor core's product.
constexpr int columns = 8;
constexpr int lanes = 32, most_warps = 8;

// Weights in registers of a warp: 16 rows x 64 bytes, a *tile's block*, take 8 registers of each thread. As many as the
// 255 registers hold without spilling; backward has more else to hold. Multiply-adds use each weight for eight columns,
// so that reading it from shared memory costs nothing beside them; they rather have the columns of two blocks, 64
// registers, on their way. A warp with more tiles makes for fewer CTAs, which have to meet, each with fewer blocks of a
// row.
constexpr int tile_rows = 16;
constexpr int held_blocks(Arithmetic a, bool backward) {
  return a == Arithmetic::f32 ? backward ? 6 : 8 : backward ? 12 : 16;
}
constexpr int tiles_forward(int gates, int64_t value_bytes) { return gates == 1 ? 1 : value_bytes == 2 ? gates : 2; }
constexpr int tiles_backward = 1;

// The per-step kernel: rows and columns of a CTA's tile of the product, blocks of each copied at once, copies ahead.
constexpr int step_rows = 64, step_columns = 64, step_blocks = 2, step_stages = 3;
constexpr int64_t step_shared_bytes = step_stages * step_blocks * (step_rows + step_columns) * block_bytes;
static_assert(step_shared_bytes >= step_rows * (step_columns + 1) * 8, "the sums use the stages' memory");
static_assert(step_shared_bytes <= 48 << 10, "a launch would have to ask for more");

// How one launch is laid out. CTAs: unit blocks fastest, then slices of the batch, then directions.
struct Geometry {
  int row_groups, k_groups;
  int first_direction;
  int units, unit_blocks, slice, slices;
  int blocks, shared_blocks;  // blocks in a row; blocks of each warp in shared memory
  int ring_row;               // bytes of a sequence in the ring
  int ring_rows;              // sequences of a slice in the ring, a multiple of `columns`
  void* ring;                 // (directions, slices, buffers, ring_rows, ring_row) in global memory, zeroed or emptied
  unsigned* arrivals;         // (directions, slices), zeroed, 128 bytes apart
  void* states;               // per step: Real (directions, states, B, H)
  // Byte offsets in shared memory.
  int sums_at, bias_at, states_at, weights_at, ring_at;
};
constexpr int64_t arrivals_apart = 128 / sizeof(unsigned);
constexpr int empty_byte = 0xff;  // of a place in the ring that waits for its value
constexpr int ring_buffers(Exchange e) { return e == Exchange::flags ? 8 : 2; }

// The one argument of a persistent kernel.
struct Arguments {
  Geometry geometry;
  union {
    Forward forward;
    Backward backward;
  };
  Arguments() : geometry{}, forward{} {}
};

// The per-step kernels read theirs from device memory, so that a recorded graph serves other calls as well: it holds
// the launches of `graph_steps` steps, numbered from `first_step`, and moves that on at its end.
struct StepArguments {
  Arguments call;
  int64_t first_step;
};
constexpr int graph_steps = 32;

using Kernel = void (*)(Arguments);
using StepKernel = void (*)(const StepArguments*, int64_t step);

struct CellKernels {
  // Forward, backward; null where an arithmetic has none.
  Kernel one_cta[2], grid[2][2];  // by Exchange first
  StepKernel start[2], step[2];
};

// One table per arithmetic, each in a file of its own, so that they compile side by side.
extern const CellKernels kernels_f32[], kernels_tf32[], kernels_bf16[], kernels_f16[], kernels_f64[];

}  // namespace fusedrnn::cuda
