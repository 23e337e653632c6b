#include <pybind11/stl.h>

#include <optional>

#include "arrays.h"
#include "codec.h"
#include "modules.h"

namespace py = pybind11;

namespace tierstore {
namespace {

void decode_rows(const Input<uint8_t>& rows, py::ssize_t dim, std::optional<float> scale, py::array& out) {
  require(rows.ndim() == 2 && dim > 0 && rows.shape(1) >= dim, "rows must be [rows, row_bytes], of at least dim bytes");
  const auto block = static_cast<py::ssize_t>(kScaleBlock);
  require(scale || (dim % block == 0 && rows.shape(1) >= dim + dim / block),
          "without a scale, dim must be a multiple of 32, and a row hold dim values and a scale for each 32 of them");
  require(has_shape(out, {rows.shape(0), dim}), "out must be [rows, dim]");
  const uint8_t* bytes = rows.data();
  const auto num_rows = static_cast<size_t>(rows.shape(0)), row_bytes = static_cast<size_t>(rows.shape(1));
  uint16_t* to = output_of<uint16_t>(out, "out must be contiguous uint16");
  py::gil_scoped_release released;
  decode_fp8_rows(bytes, num_rows, row_bytes, static_cast<size_t>(dim), scale ? &*scale : nullptr, to);
}

}  // namespace

void bind_codec(py::module_& module) {
  module.def("decode_fp8_rows", &decode_rows, py::arg("rows"), py::arg("dim"), py::arg("scale"), py::arg("out"));
}

}  // namespace tierstore
