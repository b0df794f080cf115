// Python module fusedrnn._cuda. It takes addresses of device memory and sizes as integers: the engine (engines/cuda.py)
// has checked the tensors they come from, and keeps them alive.
#include "cuda.h"

#include <pybind11/stl.h>

#include <cmath>

#include "../cuda/launch.h"

namespace py = pybind11;

namespace fusedrnn {
namespace {

using namespace cuda;

using Addresses = std::vector<std::uintptr_t>;  // 0 where there is none

void* pointer(std::uintptr_t address) { return reinterpret_cast<void*>(address); }

template <class Pointer, size_t n>
void fill(Pointer (&to)[n], const Addresses& from, const char* name) {
  if (from.size() > n) throw std::invalid_argument(std::string("too many addresses for ") + name);
  for (size_t i = 0; i < from.size(); ++i) to[i] = pointer(from[i]);
}

Sequence sequence_of(const Sizes& sizes, int64_t tokens, std::uintptr_t starts, std::uintptr_t lengths,
                     std::uintptr_t resets, std::uintptr_t h_mask, const std::vector<double>& zoneout,
                     std::uintptr_t seed) {
  if (zoneout.size() > max_states) throw std::invalid_argument("too many rates of zoneout");
  Sequence seq{};
  seq.T = sizes.T, seq.B = sizes.B, seq.H = sizes.H, seq.tokens = tokens, seq.directions = sizes.directions;
  seq.starts = static_cast<const int64_t*>(pointer(starts));
  seq.lengths = static_cast<const int64_t*>(pointer(lengths));
  seq.resets = static_cast<const uint8_t*>(pointer(resets));
  seq.h_mask = pointer(h_mask);
  for (size_t s = 0; s < zoneout.size(); ++s) {
    seq.zoneout[s] = zoneout[s];
    seq.stays_below[s] = static_cast<uint32_t>(std::ceil(zoneout[s] * 0x1p24));
  }
  seq.seed = static_cast<const uint64_t*>(pointer(seed));
  return seq;
}

CellKind cell_kind(const std::string& name) {
  for (int c = 0; c < static_cast<int>(CellKind::count); ++c)
    if (name == cell_facts[c].name) return static_cast<CellKind>(c);
  throw std::invalid_argument("no cell is called " + name);
}

}  // namespace

void register_cuda(py::module_& m) {
  // The module over the emulator has the same types; both may be loaded in one process.
  const py::module_local local;
  m.doc() = "CUDA kernels. See csrc/cuda/launch.h for the contract and fusedrnn/engines/cuda.py for the use.";

  py::register_local_exception<LaunchRefused>(m, "LaunchRefused", PyExc_RuntimeError);

  py::enum_<Arithmetic>(m, "Arithmetic", local)
      .value("f32", Arithmetic::f32)
      .value("tf32", Arithmetic::tf32)
      .value("bf16", Arithmetic::bf16)
      .value("f16", Arithmetic::f16)
      .value("f64", Arithmetic::f64);
  py::enum_<Path>(m, "Path", local)
      .value("automatic", Path::automatic)
      .value("one_cta", Path::one_cta)
      .value("grid", Path::grid)
      .value("per_step", Path::per_step);
  py::enum_<Exchange>(m, "Exchange", local).value("counter", Exchange::counter).value("flags", Exchange::flags);

  py::class_<Sizes>(m, "Sizes", local)
      .def(py::init([](const std::string& cell, Arithmetic arithmetic, bool backward, int64_t T, int64_t B, int64_t H,
                       int directions) {
             if (T < 1 || B < 1 || H < 1 || directions < 1 || directions > max_directions)
               throw std::invalid_argument("sizes must be positive, and directions 1 or 2");
             return Sizes{cell_kind(cell), arithmetic, backward, T, B, H, directions};
           }),
           py::arg("cell"), py::arg("arithmetic"), py::arg("backward"), py::arg("T"), py::arg("B"), py::arg("H"),
           py::arg("directions"));

  py::class_<Plan>(m, "Plan", local)
      .def_readonly("path", &Plan::path)
      .def_readonly("exchange", &Plan::exchange)
      .def_readonly("row_groups", &Plan::row_groups)
      .def_readonly("k_groups", &Plan::k_groups)
      .def_readonly("units", &Plan::units)
      .def_readonly("unit_blocks", &Plan::unit_blocks)
      .def_readonly("slice", &Plan::slice)
      .def_readonly("slices", &Plan::slices)
      .def_readonly("directions_at_once", &Plan::directions_at_once)
      .def_readonly("shared_blocks", &Plan::shared_blocks)
      .def_readonly("shared_bytes", &Plan::shared_bytes)
      .def_readonly("scratch_bytes", &Plan::scratch_bytes)
      .def("__str__", [](const Plan& plan) { return plan.why; });

  m.def(
      "plan",
      [](const Sizes& sizes, int device, Path path, int row_groups, int k_groups, int slice, Exchange exchange) {
        if (row_groups < 0 || k_groups < 0 || slice < 0) throw std::invalid_argument("a wish must not be negative");
        return make_plan(sizes, {path, row_groups, k_groups, slice, exchange}, device);
      },
      py::arg("sizes"), py::arg("device"), py::arg("path") = Path::automatic, py::arg("row_groups") = 0,
      py::arg("k_groups") = 0, py::arg("slice") = 0, py::arg("exchange") = Exchange::counter);

  m.def(
      "forward",
      [](const Sizes& sizes, const Plan& plan, int device, std::uintptr_t stream, std::uintptr_t scratch,
         int64_t tokens, std::uintptr_t starts, std::uintptr_t lengths, std::uintptr_t resets, std::uintptr_t h_mask,
         const std::vector<double>& zoneout, std::uintptr_t seed, std::uintptr_t gates_x, const Addresses& w_hh,
         int64_t w_stride, const Addresses& b_hh, const Addresses& initial, std::uintptr_t output, int64_t output_step,
         int64_t output_row, const Addresses& final, std::uintptr_t kept, std::uintptr_t cells,
         std::uintptr_t computed) {
        Forward f{};
        static_cast<Sequence&>(f) = sequence_of(sizes, tokens, starts, lengths, resets, h_mask, zoneout, seed);
        f.gates_x = pointer(gates_x);
        fill(f.w_hh, w_hh, "w_hh"), f.w_stride = w_stride;
        fill(f.b_hh, b_hh, "b_hh");
        fill(f.initial, initial, "initial");
        f.output = pointer(output), f.output_step = output_step, f.output_row = output_row;
        fill(f.final, final, "final");
        f.kept = pointer(kept), f.cells = pointer(cells), f.computed = pointer(computed);
        cuda::forward(f, sizes, plan, pointer(scratch), device, pointer(stream));
      },
      py::kw_only(), py::arg("sizes"), py::arg("plan"), py::arg("device"), py::arg("stream"), py::arg("scratch"),
      py::arg("tokens"), py::arg("starts"), py::arg("lengths"), py::arg("resets"), py::arg("h_mask"),
      py::arg("zoneout"), py::arg("seed"), py::arg("gates_x"), py::arg("w_hh"), py::arg("w_stride"), py::arg("b_hh"),
      py::arg("initial"), py::arg("output"), py::arg("output_step"), py::arg("output_row"), py::arg("final"),
      py::arg("kept"), py::arg("cells"), py::arg("computed"));

  m.def(
      "backward",
      [](const Sizes& sizes, const Plan& plan, int device, std::uintptr_t stream, std::uintptr_t scratch,
         int64_t tokens, std::uintptr_t starts, std::uintptr_t lengths, std::uintptr_t resets, std::uintptr_t h_mask,
         const std::vector<double>& zoneout, std::uintptr_t seed, const Addresses& w_hh_t, int64_t w_stride,
         const Addresses& initial, std::uintptr_t output, int64_t output_step, int64_t output_row, std::uintptr_t kept,
         std::uintptr_t cells, std::uintptr_t computed, std::uintptr_t d_output, int64_t d_output_step,
         int64_t d_output_row, const Addresses& d_final, std::uintptr_t d_slots, const Addresses& d_initial) {
        Backward b{};
        static_cast<Sequence&>(b) = sequence_of(sizes, tokens, starts, lengths, resets, h_mask, zoneout, seed);
        fill(b.w_hh_t, w_hh_t, "w_hh_t"), b.w_stride = w_stride;
        fill(b.initial, initial, "initial");
        b.output = pointer(output), b.output_step = output_step, b.output_row = output_row;
        b.kept = pointer(kept), b.cells = pointer(cells), b.computed = pointer(computed);
        b.d_output = pointer(d_output), b.d_output_step = d_output_step, b.d_output_row = d_output_row;
        fill(b.d_final, d_final, "d_final");
        b.d_slots = pointer(d_slots);
        fill(b.d_initial, d_initial, "d_initial");
        cuda::backward(b, sizes, plan, pointer(scratch), device, pointer(stream));
      },
      py::kw_only(), py::arg("sizes"), py::arg("plan"), py::arg("device"), py::arg("stream"), py::arg("scratch"),
      py::arg("tokens"), py::arg("starts"), py::arg("lengths"), py::arg("resets"), py::arg("h_mask"),
      py::arg("zoneout"), py::arg("seed"), py::arg("w_hh_t"), py::arg("w_stride"), py::arg("initial"),
      py::arg("output"), py::arg("output_step"), py::arg("output_row"), py::arg("kept"), py::arg("cells"),
      py::arg("computed"), py::arg("d_output"), py::arg("d_output_step"), py::arg("d_output_row"), py::arg("d_final"),
      py::arg("d_slots"), py::arg("d_initial"));

  m.def("cell_facts", [](const std::string& name) {
    const CellFacts& facts = cuda::cell_facts[static_cast<int>(cell_kind(name))];
    py::dict result;
    result["gates"] = facts.gates;
    result["states"] = facts.states;
    result["slots"] = facts.slots;
    result["kept"] = facts.kept;
    result["input_slot"] = std::vector<int>(facts.input_slot, facts.input_slot + facts.gates);
    return result;
  });
  m.def("device_count", &cuda::device_count);
  m.def("device", [](int device) {
    const DeviceFacts facts = device_facts(device);
    py::dict result;
    result["name"] = facts.name;
    result["capability"] = py::make_tuple(facts.major, facts.minor);
    result["processors"] = facts.processors;
    result["shared_bytes"] = facts.shared_bytes;
    result["cooperative"] = facts.cooperative;
    return result;
  });
  m.def(
      "versions", [] { return py::make_tuple(runtime_version(), driver_version()); },
      "CUDA versions of the runtime that is linked in and of the driver, 0 where there is none; 13010 is 13.1");
}

}  // namespace fusedrnn
