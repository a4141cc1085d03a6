// What the tests set and ask of the emulation.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../../csrc/cuda/multi_loss.h"
#include "cuda_emulation.h"

namespace py = pybind11;
using emulation::machine;

PYBIND11_MODULE(emulated, m) {
  m.def(
      "reset",
      [](int order, unsigned seed, const std::string& skipped, bool dry) {
        machine.order = static_cast<emulation::Order>(order);
        machine.random.seed(seed);
        machine.skipped = skipped;
        machine.dry = dry;
        machine.error.clear();
        machine.barriers.clear();
        machine.launches = 0;
      },
      "Forget errors; threads and blocks run ascending (0), descending (1), in random order (2), or not at all (dry).",
      py::arg("order") = 0, py::arg("seed") = 0, py::arg("skipped") = "", py::arg("dry") = false);
  m.def("error", [] { return machine.error; }, "What the checks found first, or ''.");
  m.def("barriers", [] { return machine.barriers; }, "file:line of every __syncthreads that was reached since `reset`.");
  m.def("set_slab", [](int64_t bytes) { return std::exchange(lid::cuda::slab_bytes, bytes); },
        "How much of volumes multi_loss works on at once; returns how much it was.");
  m.def("launches", [] { return machine.launches; }, "How many kernels were launched since `reset`.");
}
