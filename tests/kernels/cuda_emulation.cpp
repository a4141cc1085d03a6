// What the tests set and ask of the emulation.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda_emulation.h"

namespace py = pybind11;
using emulation::machine;

PYBIND11_MODULE(emulated, m) {
  m.def(
      "reset",
      [](int order, unsigned seed, const std::string& skipped) {
        machine.order = static_cast<emulation::Order>(order);
        machine.random.seed(seed);
        machine.skipped = skipped;
        machine.error.clear();
        machine.barriers.clear();
        machine.launches = 0;
      },
      "Forget errors; threads and blocks run ascending (0), descending (1) or in random order (2).", py::arg("order") = 0,
      py::arg("seed") = 0, py::arg("skipped") = "");
  m.def("error", [] { return machine.error; }, "What the checks found first, or ''.");
  m.def("barriers", [] { return machine.barriers; }, "file:line of every __syncthreads that was reached since `reset`.");
  m.def("launches", [] { return machine.launches; }, "How many kernels were launched since `reset`.");
}
