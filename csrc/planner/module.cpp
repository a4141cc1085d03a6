// lidnet_fast._C_planner: the planner for NumPy arrays. Unlike the libraries beside it, it is for one version of Python.

#include <stdexcept>
#include <string>
#include <vector>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "window_planner.h"

namespace py = pybind11;

namespace lid {
namespace {

using Boxes = py::array_t<double, py::array::c_style | py::array::forcecast>;

WindowPlanner window_planner(std::vector<Axis> axes, std::vector<double> map_costs, double kind_cost, double window_penalty,
                             size_t most_windows) {
  if (axes.empty() || axes.size() > kMostAxes) throw std::invalid_argument("axes must be one to three");
  for (const Axis& axis : axes) {
    if (axis.maps.size() != map_costs.size()) throw std::invalid_argument("map_costs must have one number per map");
  }
  return {std::move(axes), std::move(map_costs), kind_cost, window_penalty, most_windows};
}

// (image of each window; start and stop, [windows, axes]; window of each box; image computed as a whole -> what its
// windows would cost; cost of all windows)
py::tuple plan(const WindowPlanner& planner, const Boxes& boxes, double whole_cost, bool aligned, bool share_kinds) {
  const size_t axes = planner.axes.size();
  if (boxes.ndim() != 2 || boxes.shape(1) != static_cast<py::ssize_t>(1 + 2 * axes)) {
    throw std::invalid_argument("boxes must have shape [K, " + std::to_string(1 + 2 * axes) + "]");
  }
  const WindowPlan plan = planner.plan(boxes.data(), boxes.shape(0), whole_cost, aligned, share_kinds);
  const size_t count = plan.windows.size();
  py::array_t<int64_t> images(count), window_of_box(plan.window_of_box.size(), plan.window_of_box.data());
  py::array_t<int64_t> start({count, axes}), stop({count, axes});
  for (size_t w = 0; w < count; ++w) {
    images.mutable_at(w) = plan.windows[w].image;
    for (size_t a = 0; a < axes; ++a) {
      start.mutable_at(w, a) = plan.windows[w].units[a].start;
      stop.mutable_at(w, a) = plan.windows[w].units[a].stop;
    }
  }
  return py::make_tuple(images, start, stop, window_of_box, plan.whole, plan.cost);
}

}  // namespace
}  // namespace lid

PYBIND11_MODULE(_C_planner, m) {
  py::class_<lid::Layer>(m, "Layer").def(py::init<double, int64_t, int64_t>(), py::arg("stride"), py::arg("ratio"),
                                         py::arg("cells"));
  py::class_<lid::MapCells>(m, "MapCells")
      .def(py::init<double, double, double>(), py::arg("per_unit"), py::arg("extra"), py::arg("most"));
  py::class_<lid::Axis>(m, "Axis")
      .def(py::init<std::vector<lid::Layer>, std::vector<lid::MapCells>, std::vector<int64_t>, int64_t, int64_t, int64_t>(),
           py::arg("layers"), py::arg("maps"), py::arg("buckets"), py::arg("units"), py::arg("first_free"),
           py::arg("last_free"));
  py::class_<lid::WindowPlanner>(m, "WindowPlanner")
      .def(py::init(&lid::window_planner), py::arg("axes"), py::arg("map_costs"), py::arg("kind_cost"),
           py::arg("window_penalty"), py::arg("most_windows"))
      .def("plan", &lid::plan, py::arg("boxes"), py::arg("whole_cost"), py::arg("aligned"), py::arg("share_kinds"));
}
