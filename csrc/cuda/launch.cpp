// From a call to launches: which path serves it, how it is divided, and the launches themselves.
#include "launch.h"

#include <algorithm>
#include <stdexcept>

#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../cells/rnn.h"
#include "runtime.h"

namespace fusedrnn::cuda {
namespace {

template <class Cell>
constexpr CellFacts facts_of(const char* name) {
  CellFacts facts{name, Cell::gates, Cell::states, Cell::slots, Cell::kept, {}};
  for (int g = 0; g < Cell::gates; ++g) {
    facts.input_slot[g] = Cell::input_slot[g];
    if (Cell::recurrent_slot[g] != Cell::slots - Cell::gates + g) throw "the ring wants the gates in torch's order";
  }
  return facts;
}

}  // namespace

constexpr CellFacts cell_facts_table[] = {facts_of<RnnTanh>("rnn_tanh"), facts_of<RnnRelu>("rnn_relu"),
                                          facts_of<Lstm>("lstm"), facts_of<Gru>("gru")};
const CellFacts cell_facts[] = {cell_facts_table[0], cell_facts_table[1], cell_facts_table[2], cell_facts_table[3]};

namespace {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

int64_t value_bytes(Arithmetic a) {
  return a == Arithmetic::f64 ? 8 : a == Arithmetic::bf16 || a == Arithmetic::f16 ? 2 : 4;
}
int64_t real_bytes(Arithmetic a) { return a == Arithmetic::f64 ? 8 : 4; }

const CellKernels& kernels(const Sizes& sizes) {
  const CellKernels* tables[] = {kernels_f32, kernels_tf32, kernels_bf16, kernels_f16, kernels_f64};
  return tables[static_cast<int>(sizes.arithmetic)][static_cast<int>(sizes.cell)];
}

// The shape of a pass's product.
struct Shape {
  int rows, rings, states, tiles;  // as in passes.h
  int held;                        // blocks of each warp in registers
  int64_t K;                       // what is summed over

  explicit Shape(const Sizes& sizes) {
    const CellFacts& cell = cell_facts[static_cast<int>(sizes.cell)];
    rows = sizes.backward ? 1 : cell.gates;
    rings = sizes.backward ? cell.gates : 1;
    states = cell.states;
    tiles = sizes.backward ? tiles_backward : tiles_forward(cell.gates, value_bytes(sizes.arithmetic));
    held = held_blocks(sizes.arithmetic, sizes.backward) / tiles;
    K = rings * sizes.H;
  }
};

// Rows of the ring in shared memory lie an odd number of blocks apart, so that eight of them meet in no bank.
int ring_row_bytes(const Plan& plan) {
  return (plan.path == Path::one_cta ? plan.blocks | 1 : plan.blocks) * block_bytes;
}

Geometry geometry_of(const Sizes& sizes, const Plan& plan, int64_t* shared_bytes = nullptr) {
  const Shape shape(sizes);
  const int64_t real = real_bytes(sizes.arithmetic);
  Geometry g{};
  g.row_groups = plan.row_groups, g.k_groups = plan.k_groups;
  g.units = plan.units, g.unit_blocks = plan.unit_blocks, g.slice = plan.slice, g.slices = plan.slices;
  g.blocks = plan.blocks, g.shared_blocks = plan.shared_blocks;
  g.ring_row = ring_row_bytes(plan);
  g.ring_rows = static_cast<int>(round_up(plan.path == Path::per_step ? sizes.B : plan.slice, columns));
  if (plan.path == Path::per_step) return g;
  int64_t at = 0;  // more than an int only in plans that are dropped
  const auto take = [&](int64_t bytes) {
    const int first = static_cast<int>(at);
    at += round_up(bytes, 16);
    return first;
  };
  const int64_t cta_rows = static_cast<int64_t>(plan.row_groups) * shape.tiles * tile_rows;
  g.sums_at = take(2 * plan.k_groups * cta_rows * (columns + 1) * real);
  g.bias_at = take(shape.rows * plan.units * real);
  g.states_at = take(shape.states * plan.slice * plan.units * real);
  g.ring_at = take(plan.path == Path::one_cta ? 2 * g.ring_rows * g.ring_row : 0);
  g.weights_at = take(static_cast<int64_t>(plan.row_groups) * plan.k_groups * plan.shared_blocks * shape.tiles *
                      tile_rows * block_bytes);
  if (shared_bytes) *shared_bytes = at;
  return g;
}

int64_t arrivals_bytes(const Plan& plan, int directions) {
  return directions * plan.slices * arrivals_apart * static_cast<int64_t>(sizeof(unsigned));
}

Kernel kernel_of(const Sizes& sizes, const Plan& plan) {
  const CellKernels& k = kernels(sizes);
  return (plan.path == Path::one_cta ? k.one_cta : k.grid[static_cast<int>(plan.exchange)])[sizes.backward];
}

// The ring in global memory of one direction.
int64_t ring_bytes(const Plan& plan, const Geometry& g) {
  return int64_t{ring_buffers(plan.exchange)} * plan.slices * g.ring_rows * g.ring_row;
}

int threads_of(const Plan& plan) { return plan.row_groups * plan.k_groups * lanes; }

// What a step takes, in nanoseconds: a guess that only has to rank plans. [est], not measured.
double persistent_step(const Sizes& sizes, const Shape& shape, const Plan& plan) {
  const bool scalar = sizes.arithmetic == Arithmetic::f32;
  const double warps = plan.row_groups * plan.k_groups, chunks = static_cast<double>(ceil_div(plan.slice, columns));
  const double each = static_cast<double>(ceil_div(plan.blocks, plan.k_groups));
  const double tile_blocks = warps * each * shape.tiles;  // of a CTA, 1 KB each
  const double in_registers = std::min(each, static_cast<double>(shape.held));
  const double in_shared = static_cast<double>(plan.shared_blocks);
  const double streamed = std::max(0.0, each - in_registers - in_shared);
  const double kb = warps * shape.tiles;
  const double product = (scalar ? 64.0 : 16.0) * tile_blocks / 4;
  const double memory =
      in_shared * kb * 8 + streamed * kb * 30 + static_cast<double>(plan.row_groups) * plan.blocks * 10;
  const double fixed = 700 + (plan.path == Path::grid ? 400 : -300);
  const double pairs = static_cast<double>(plan.units) * columns / (warps * lanes) * 150;
  const double barrier = plan.path == Path::grid ? 1200 + 4 * static_cast<double>(plan.unit_blocks) : 60;
  return (chunks * (std::max(product, memory) + fixed + pairs)) / 1.7 + barrier;
}

double per_step_step(const Sizes& sizes, const Shape& shape) {
  const double operations = 2.0 * static_cast<double>(sizes.B) * static_cast<double>(shape.rows * sizes.H) *
                            static_cast<double>(shape.K) * sizes.directions;
  const double per_ns[] = {25e3, 60e3, 120e3, 120e3, 15e3};
  return 4500 + operations / per_ns[static_cast<int>(sizes.arithmetic)];
}

std::string count(int64_t n, const char* what) { return std::to_string(n) + " " + what + (n == 1 ? "" : "s"); }

std::string describe(const Sizes& sizes, const Shape& shape, const Plan& plan) {
  const std::string ctas = count(int64_t{plan.unit_blocks} * plan.slices * plan.directions_at_once, "CTA") + " x " +
                           std::to_string(threads_of(plan)) + " threads";
  if (plan.path == Path::per_step) return "one launch per step, " + ctas;
  const int64_t each = ceil_div(plan.blocks, plan.k_groups), held = shape.held;
  std::string weights = "weights in registers";
  if (each > held) weights += plan.shared_blocks ? " and shared memory" : "";
  if (each > held + plan.shared_blocks)
    weights += ", " + std::to_string(100 * (each - held - plan.shared_blocks) / each) + "% read from the L2 cache";
  const char* const kind = plan.path == Path::one_cta         ? "persistent, one CTA for all units"
                           : plan.exchange == Exchange::flags ? "persistent grid with flags"
                                                              : "persistent grid";
  return std::string(kind) + ", " + ctas + ", " + weights +
         (plan.directions_at_once < sizes.directions ? ", one direction after the other" : "");
}

// The division of a persistent launch among `row_groups` x `k_groups` warps a CTA; false if the device cannot run it.
bool divide(const Sizes& sizes, const Wish& wish, const DeviceFacts& device, Plan& plan) {
  const Shape shape(sizes);
  const int64_t value = value_bytes(sizes.arithmetic);
  if (plan.row_groups * plan.k_groups > most_warps) return false;
  plan.units = plan.row_groups * shape.tiles * tile_rows / shape.rows;
  plan.unit_blocks = static_cast<int>(ceil_div(sizes.H, plan.units));
  plan.path = plan.unit_blocks == 1 && wish.path != Path::grid ? Path::one_cta : Path::grid;
  if (wish.path != Path::automatic && wish.path != plan.path) return false;
  plan.exchange = wish.exchange;
  if (plan.path == Path::grid && (sizes.T + 2) * plan.unit_blocks > INT32_MAX) return false;
  plan.blocks = static_cast<int>(ceil_div(shape.K * value, block_bytes));
  const int most = device.processors / plan.unit_blocks;  // one CTA per processor: each takes all registers
  if (most < 1) return false;
  plan.directions_at_once = most >= sizes.directions ? sizes.directions : 1;
  const int64_t slices = std::min<int64_t>(most / plan.directions_at_once, ceil_div(sizes.B, columns));
  plan.slice = wish.slice ? wish.slice : static_cast<int>(round_up(ceil_div(sizes.B, slices), columns));
  plan.slices = static_cast<int>(ceil_div(sizes.B, plan.slice));
  plan.shared_blocks = 0;
  geometry_of(sizes, plan, &plan.shared_bytes);
  const int64_t left = device.shared_bytes - plan.shared_bytes;
  const int64_t over = ceil_div(plan.blocks, plan.k_groups) - shape.held;
  const int64_t shared_block = int64_t{plan.row_groups} * plan.k_groups * shape.tiles * tile_rows * block_bytes;
  if (left < 0) return false;
  if (over > 0) plan.shared_blocks = static_cast<int>(std::min(over, left / shared_block));
  plan.shared_bytes += plan.shared_blocks * shared_block;
  const int64_t ctas = int64_t{plan.unit_blocks} * plan.slices * plan.directions_at_once;
  if (runtime::resident_ctas(kernel_of(sizes, plan), threads_of(plan), plan.shared_bytes, device) < ctas) return false;
  const Geometry g = geometry_of(sizes, plan);
  if (ring_bytes(plan, g) / plan.slices > INT32_MAX) return false;  // the kernels count it in ints
  plan.scratch_bytes = arrivals_bytes(plan, sizes.directions);
  if (plan.path == Path::grid) plan.scratch_bytes += sizes.directions * ring_bytes(plan, g);
  return true;
}

// Where the parts of a per-step call's scratch memory begin.
struct StepScratch {
  int64_t arguments, ring, states, bytes;
  StepScratch(const Sizes& sizes, const Geometry& g) {
    arguments = 0;
    ring = round_up(sizeof(StepArguments), block_bytes);
    states = ring + int64_t{2} * sizes.directions * g.ring_rows * g.ring_row;
    bytes = states + sizes.directions * Shape(sizes).states * sizes.B * sizes.H * real_bytes(sizes.arithmetic);
  }
};

Plan per_step_plan(const Sizes& sizes) {
  const Shape shape(sizes);
  Plan plan{};
  plan.path = Path::per_step;
  plan.row_groups = most_warps, plan.k_groups = 1;
  plan.units = step_rows / shape.rows;
  plan.unit_blocks = static_cast<int>(ceil_div(sizes.H, plan.units));
  plan.slice = step_columns;
  plan.slices = static_cast<int>(ceil_div(sizes.B, plan.slice));
  plan.directions_at_once = sizes.directions;
  plan.blocks = static_cast<int>(ceil_div(shape.K * value_bytes(sizes.arithmetic), block_bytes));
  plan.shared_bytes = step_shared_bytes;
  plan.scratch_bytes = StepScratch(sizes, geometry_of(sizes, plan)).bytes;
  return plan;
}

void run_per_step(Arguments& arguments, const Sizes& sizes, const Plan& plan, char* scratch, Stream stream) {
  Geometry& g = arguments.geometry;
  const StepScratch at(sizes, g);
  g.ring = scratch + at.ring, g.states = scratch + at.states;
  const CellKernels& k = kernels(sizes);
  const runtime::Shape shape{int64_t{plan.unit_blocks} * plan.slices * sizes.directions, threads_of(plan),
                             plan.shared_bytes, stream};
  const StepKernel kernel = k.step[sizes.backward];
  int64_t steps = sizes.T + sizes.backward;
  runtime::StepGraph* const graph =
      steps < graph_steps || runtime::is_capturing(stream) ? nullptr : runtime::step_graph(kernel, shape);
  StepArguments* const on_device =
      graph ? graph->arguments() : reinterpret_cast<StepArguments*>(scratch + at.arguments);
  runtime::write_arguments(on_device, {arguments, 0}, stream);
  runtime::fill(g.ring, 0, at.states - at.ring, stream);
  runtime::launch(k.start[sizes.backward], shape, on_device, 0);
  for (; graph && steps >= graph_steps; steps -= graph_steps) graph->launch();
  for (int64_t step = 0; step < steps; ++step) runtime::launch(kernel, shape, on_device, step);
}

void run(Arguments& arguments, const Sizes& sizes, const Plan& plan, void* scratch, Stream stream) {
  Geometry& g = arguments.geometry;
  g = geometry_of(sizes, plan);
  if (plan.path == Path::per_step) return run_per_step(arguments, sizes, plan, static_cast<char*>(scratch), stream);
  const bool flags = plan.path == Path::grid && plan.exchange == Exchange::flags;
  runtime::fill(scratch, flags ? empty_byte : 0, plan.scratch_bytes, stream);
  for (int d = 0; d < sizes.directions; d += plan.directions_at_once) {
    char* const rings = static_cast<char*>(scratch) + arrivals_bytes(plan, sizes.directions);
    g.first_direction = d;
    g.arrivals = static_cast<unsigned*>(scratch) + d * plan.slices * arrivals_apart;
    g.ring = rings + d * ring_bytes(plan, g);
    runtime::launch_cooperative(kernel_of(sizes, plan),
                                {int64_t{plan.unit_blocks} * plan.slices * plan.directions_at_once, threads_of(plan),
                                 plan.shared_bytes, stream},
                                arguments);
  }
}

}  // namespace

int device_count() { return runtime::device_count(); }
DeviceFacts device_facts(int device) { return runtime::device_facts(device); }
int runtime_version() { return runtime::runtime_version(); }
int driver_version() { return runtime::driver_version(); }

Plan make_plan(const Sizes& sizes, const Wish& wish, int device_index) {
  constexpr int64_t most_sequences = 1 << 30, most_units = 1 << 24;
  if (sizes.B > most_sequences || sizes.H > most_units)
    throw std::runtime_error("a batch of " + std::to_string(sizes.B) + " sequences with " + std::to_string(sizes.H) +
                             " hidden units is more than the kernels can count (" + std::to_string(most_sequences) +
                             ", " + std::to_string(most_units) + ")");
  const runtime::CurrentDevice current(device_index);
  const DeviceFacts device = runtime::device_facts(device_index);
  const Shape shape(sizes);
  Plan best{};
  double best_time = 0;
  const bool has_persistent = kernels(sizes).one_cta[0] != nullptr;
  if (has_persistent && device.cooperative && wish.path != Path::per_step)
    for (int row_groups = most_warps; row_groups >= 1; row_groups /= 2) {
      Plan plan{};
      plan.row_groups = wish.row_groups ? wish.row_groups : row_groups;
      plan.k_groups = wish.k_groups ? wish.k_groups : most_warps / row_groups;
      if (!divide(sizes, wish, device, plan)) continue;
      const double time = persistent_step(sizes, shape, plan);
      if (best_time == 0 || time < best_time) best = plan, best_time = time;
    }
  if (best_time == 0 && wish.path != Path::per_step && wish.path != Path::automatic)
    throw std::runtime_error(std::string("no ") + (wish.path == Path::one_cta ? "one-CTA" : "persistent grid") +
                             " kernel can run this call on " + device.name);
  if (best_time == 0 || (wish.path == Path::automatic && per_step_step(sizes, shape) < best_time))
    best = per_step_plan(sizes);
  best.why = describe(sizes, shape, best);
  return best;
}

void forward(const Forward& problem, const Sizes& sizes, const Plan& plan, void* scratch, int device, Stream stream) {
  const runtime::CurrentDevice current(device);
  Arguments arguments;
  arguments.forward = problem;
  run(arguments, sizes, plan, scratch, stream);
}

void backward(const Backward& problem, const Sizes& sizes, const Plan& plan, void* scratch, int device, Stream stream) {
  const runtime::CurrentDevice current(device);
  Arguments arguments;
  arguments.backward = problem;
  run(arguments, sizes, plan, scratch, stream);
}

}  // namespace fusedrnn::cuda
