// Bytes that are written once, in place, before anybody reads them: messages whose rows nobody copies.
#include <pybind11/numpy.h>

#include "arrays.h"
#include "modules.h"

namespace py = pybind11;

namespace tierstore {
namespace {

// A bytes object of unset content, and an array over its memory that keeps it alive. CPython lets whoever made a bytes
// object write to it until others see it.
py::tuple fresh_bytes(py::ssize_t num_bytes) {
  require(num_bytes >= 0, "num_bytes is below 0");
  PyObject* made = PyBytes_FromStringAndSize(nullptr, num_bytes);
  if (made == nullptr) throw py::error_already_set();
  py::object bytes = py::reinterpret_steal<py::object>(made);
  py::array_t<uint8_t> array({num_bytes}, {py::ssize_t{1}}, reinterpret_cast<uint8_t*>(PyBytes_AS_STRING(made)), bytes);
  return py::make_tuple(std::move(bytes), std::move(array));
}

}  // namespace

void bind_messages(py::module_& module) { module.def("fresh_bytes", &fresh_bytes, py::arg("num_bytes")); }

}  // namespace tierstore
