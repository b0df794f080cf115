// Python module _cuda_emulated: everything in fusedrnn._cuda, over the emulator, and the emulator's own settings.
#include "../../csrc/bindings/cuda.h"
#include "../../csrc/cuda/device.h"
#include "runtime.h"

namespace py = pybind11;
using namespace fusedrnn::emulator;

PYBIND11_MODULE(_cuda_emulated, m) {
  fusedrnn::register_cuda(m);

  py::enum_<Schedule>(m, "Schedule")
      .value("in_order", Schedule::in_order)
      .value("reversed", Schedule::reversed)
      .value("random", Schedule::random)
      .value("ahead", Schedule::ahead);
  py::enum_<Fault>(m, "Fault")
      .value("none", Fault::none)
      .value("sync", Fault::sync)
      .value("arrive", Fault::arrive)
      .value("wait", Fault::wait)
      .value("fragment", Fault::fragment)
      .value("buffer", Fault::buffer)
      .value("copy_wait", Fault::copy_wait)
      .value("fence", Fault::fence)
      .value("put", Fault::put)
      .value("empty", Fault::empty)
      .value("full", Fault::full)
      .value("cooperative_launch", Fault::cooperative_launch)
      .value("launch", Fault::launch);
  m.def(
      "schedule", [](Schedule schedule, uint64_t seed) { settings().schedule = schedule, settings().seed = seed; },
      py::arg("schedule") = Schedule::in_order, py::arg("seed") = 0);
  m.def(
      "fault", [](Fault fault, int64_t call) { settings().fault = fault, settings().fault_at = call; },
      py::arg("fault") = Fault::none, py::arg("call") = -1);
  m.def(
      "set_device",
      [](int processors, int64_t shared_bytes, bool cooperative, std::pair<int, int> capability) {
        device() = {"emulated GPU", capability.first, capability.second, processors, shared_bytes, cooperative};
      },
      py::arg("processors") = 16, py::arg("shared_bytes") = 227 << 10, py::arg("cooperative") = true,
      py::arg("capability") = std::make_pair(9, 0));
}
