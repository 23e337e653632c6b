// The Python face of pages and checksums: argument checks, then the work with the interpreter lock released.
// kernels/_cpu.pyi says what each function promises.
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "arrays.h"
#include "crc32c.h"
#include "modules.h"
#include "pages.h"

namespace py = pybind11;

namespace tierstore {
namespace {

PageShape page_shape(py::ssize_t page_bytes, py::ssize_t rows_per_page, uint32_t version, uint32_t seed) {
  require(page_bytes > static_cast<py::ssize_t>(kTrailerBytes), "page_bytes must exceed the trailer");
  require(rows_per_page > 0, "rows_per_page must be positive");
  return {static_cast<size_t>(page_bytes), static_cast<size_t>(rows_per_page), version, seed};
}

uint32_t crc32c_checked(const py::buffer& data, uint32_t seed) {
  const py::buffer_info info = data.request();
  py::ssize_t expected_stride = info.itemsize;
  for (py::ssize_t axis = info.ndim - 1; axis >= 0; --axis) {
    require(info.shape[axis] <= 1 || info.strides[axis] == expected_stride, "data must be contiguous");
    expected_stride *= info.shape[axis];
  }
  const auto* bytes = static_cast<const uint8_t*>(info.ptr);
  const auto num_bytes = static_cast<size_t>(info.size * info.itemsize);
  py::gil_scoped_release released;
  return crc32c(bytes, num_bytes, seed);
}

void seal_pages_checked(const std::vector<ByteArray>& planes, ByteArray out, py::ssize_t rows_per_page,
                        int64_t page_start, uint32_t version, uint32_t seed) {
  require(!planes.empty(), "there must be at least one plane");
  require(out.ndim() == 2 && page_start >= 0, "out must be [pages, page_bytes], page_start not below 0");
  const PageShape shape = page_shape(out.shape(1), rows_per_page, version, seed);
  std::vector<PlaneView> views;
  py::ssize_t row_bytes = 0;
  const py::ssize_t num_rows = planes[0].ndim() == 2 ? planes[0].shape(0) : -1;
  for (const ByteArray& plane : planes) {
    require(plane.ndim() == 2 && plane.shape(0) == num_rows, "planes must be [rows, width], of equally many rows");
    views.push_back({plane.data(), static_cast<size_t>(plane.shape(1))});
    row_bytes += plane.shape(1);
  }
  require(row_bytes * rows_per_page + static_cast<py::ssize_t>(kTrailerBytes) <= out.shape(1),
          "rows_per_page rows and the trailer must fit in a page");
  require((num_rows + rows_per_page - 1) / rows_per_page == out.shape(0), "out must have a page for the rows, no more");
  uint8_t* bytes = out.mutable_data();
  py::gil_scoped_release released;
  seal_pages(views, static_cast<size_t>(num_rows), shape, static_cast<uint64_t>(page_start), bytes);
}

py::array_t<uint8_t> check_pages_checked(const ByteArray& pages, const Int64Array& page_numbers, uint32_t version,
                                         uint32_t seed) {
  require(pages.ndim() == 2 && page_numbers.ndim() == 1 && pages.shape(0) == page_numbers.shape(0),
          "pages must be [n, page_bytes] and page_numbers [n]");
  const PageShape shape = page_shape(pages.shape(1), 1, version, seed);
  py::array_t<uint8_t> status(pages.shape(0));
  const uint8_t* bytes = pages.data();
  const int64_t* numbers = page_numbers.data();
  uint8_t* out = status.mutable_data();
  const auto num_pages = static_cast<size_t>(pages.shape(0));
  {
    py::gil_scoped_release released;
    check_pages(bytes, num_pages, shape, numbers, out);
  }
  return status;
}

}  // namespace

void bind_pages(py::module_& module) {
  module.def("crc32c_backend", [] { return std::string(crc32c_backend()); });
  module.def("crc32c", &crc32c_checked, py::arg("data"), py::arg("seed") = 0u);
  module.def("seal_pages", &seal_pages_checked, py::arg("planes"), py::arg("out").noconvert(), py::arg("rows_per_page"),
             py::arg("page_start"), py::arg("version"), py::arg("seed"));
  module.def("check_pages", &check_pages_checked, py::arg("pages").noconvert(), py::arg("page_numbers"),
             py::arg("version"), py::arg("seed"));
}

}  // namespace tierstore
