#include "arrays.h"
#include "gradient_norms.h"
#include "modules.h"

namespace py = pybind11;

namespace tierstore {
namespace {

void write_gradient_norms(const Input<int64_t>& rows, const Input<float>& sums, const Input<int64_t>& block_starts,
                          py::array& out) {
  require(rows.ndim() == 1 && sums.ndim() == 2 && sums.shape(0) == rows.shape(0),
          "rows must be [rows], and sums [rows, dim]");
  require(block_starts.ndim() == 1 && block_starts.shape(0) > 0 && has_shape(out, {block_starts.shape(0)}),
          "block_starts must be [blocks], at least one, and out of the same shape");
  double* to = output_of<double>(out, "out must be contiguous float64");
  const int64_t* starts = block_starts.data();
  const auto num_rows = static_cast<size_t>(rows.shape(0)), dim = static_cast<size_t>(sums.shape(1));
  const auto num_blocks = static_cast<size_t>(block_starts.shape(0));
  for (size_t block = 1; block < num_blocks; ++block)
    require(starts[block - 1] <= starts[block], "block_starts must ascend");
  const int64_t* row_ids = rows.data();
  const float* values = sums.data();
  const py::gil_scoped_release released;
  gradient_norms(row_ids, values, num_rows, dim, starts, num_blocks, to);
}

void write_gradient_squares(const Input<int64_t>& rows, const Input<float>& sums, py::array& out) {
  require(rows.ndim() == 1 && sums.ndim() == 2 && sums.shape(0) == rows.shape(0),
          "rows must be [rows], and sums [rows, dim]");
  require(has_shape(out, {rows.shape(0)}), "out must be [rows]");
  double* to = output_of<double>(out, "out must be contiguous float64");
  const auto num_rows = static_cast<size_t>(rows.shape(0)), dim = static_cast<size_t>(sums.shape(1));
  const int64_t* row_ids = rows.data();
  const float* values = sums.data();
  const py::gil_scoped_release released;
  gradient_squares(row_ids, values, num_rows, dim, to);
}

}  // namespace

void bind_gradient_norms(py::module_& module) {
  module.def("gradient_norms", &write_gradient_norms, py::arg("rows"), py::arg("sums"), py::arg("block_starts"),
             py::arg("out"));
  module.def("gradient_squares", &write_gradient_squares, py::arg("rows"), py::arg("sums"), py::arg("out"));
}

}  // namespace tierstore
