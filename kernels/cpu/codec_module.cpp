#include <pybind11/stl.h>

#include <optional>

#include "arrays.h"
#include "codec.h"
#include "modules.h"
#include "shared_rows.h"

namespace py = pybind11;

namespace tierstore {
namespace {

constexpr size_t kFp8ValuesEach = 1 << 16;  // of a range of rows: some 20 us

void decode_rows(const Input<uint8_t>& rows, py::ssize_t dim, std::optional<float> scale, py::array& out,
                 size_t threads) {
  require(rows.ndim() == 2 && dim > 0 && rows.shape(1) >= dim, "rows must be [rows, row_bytes], of at least dim bytes");
  const auto block = static_cast<py::ssize_t>(kScaleBlock);
  require(scale || (dim % block == 0 && rows.shape(1) >= dim + dim / block),
          "without a scale, dim must be a multiple of 32, and a row hold dim values and a scale for each 32 of them");
  require(has_shape(out, {rows.shape(0), dim}), "out must be [rows, dim]");
  const uint8_t* bytes = rows.data();
  const auto num_rows = static_cast<size_t>(rows.shape(0)), row_bytes = static_cast<size_t>(rows.shape(1));
  uint16_t* to = output_of<uint16_t>(out, "out must be contiguous uint16");
  const auto num_values = static_cast<size_t>(dim);
  const float* factor = scale ? &*scale : nullptr;
  const py::gil_scoped_release released;
  share_rows(num_rows, kFp8ValuesEach / num_values + 1, threads, [&](size_t start, size_t end) {
    decode_fp8_rows(bytes + start * row_bytes, end - start, row_bytes, num_values, factor, to + start * num_values);
  });
}

}  // namespace

void bind_codec(py::module_& module) {
  module.def("decode_fp8_rows", &decode_rows, py::arg("rows"), py::arg("dim"), py::arg("scale"), py::arg("out"),
             py::arg("threads") = 1);
}

}  // namespace tierstore
