// The Python face of the rows of versions. kernels/_cpu.pyi says what each promises.
#include "overlay_module.h"

#include <pybind11/stl.h>

#include <tuple>

#include "modules.h"

namespace py = pybind11;

namespace tierstore {
namespace {

using PyVersionFile = std::tuple<FileHandle, uint64_t, uint64_t, uint32_t>;  // file, byte_start, num_rows, seed

IndexBucket* buckets_of(const ByteArray& buckets) {
  require(buckets.ndim() == 2 && buckets.shape(1) == sizeof(IndexBucket) && buckets.shape(0) >= 1 &&
              reinterpret_cast<uintptr_t>(buckets.data()) % alignof(IndexBucket) == 0,
          "buckets must be [n, 64], at a multiple of 64");
  return reinterpret_cast<IndexBucket*>(const_cast<uint8_t*>(buckets.data()));
}

void clear_index_checked(ByteArray buckets) {
  buckets.mutable_data();  // throws where it may not be written
  IndexBucket* const data = buckets_of(buckets);
  const py::gil_scoped_release released;
  clear_index(data, static_cast<size_t>(buckets.shape(0)));
}

bool put_rows_checked(const Int64Array& row_ids, uint32_t place_start, ByteArray buckets) {
  require(row_ids.ndim() == 1, "row_ids must be [n]");
  const auto num_rows = static_cast<size_t>(row_ids.size());
  require(num_rows <= kNotPlaced - size_t{place_start}, "places are below 2^32 - 1");
  buckets.mutable_data();
  IndexBucket* const data = buckets_of(buckets);
  const int64_t* ids = row_ids.data();
  const py::gil_scoped_release released;
  for (size_t i = 0; i < num_rows; ++i) require(ids[i] >= 0, "row ids are not below 0");
  return put_rows(ids, num_rows, place_start, data, static_cast<size_t>(buckets.shape(0)));
}

OverlayRecord make_overlay(ByteArray buckets, const std::vector<PyVersionFile>& files, size_t page_bytes,
                           size_t rows_per_page, uint32_t page_version) {
  OverlayRecord record;
  RowOverlay& overlay = record.overlay;
  overlay.index = {buckets_of(buckets), static_cast<size_t>(buckets.shape(0))};
  record.buckets = std::move(buckets);
  require(page_bytes > kTrailerBytes && rows_per_page >= 1, "a page has rows and a trailer");
  require(!files.empty() && files.size() <= kVersionFilesMax, "versions have 1 to 65536 files");
  overlay.shape = {page_bytes, rows_per_page, page_version, 0};
  uint64_t place = 0;
  for (const auto& [handle, byte_start, num_rows, seed] : files) {
    VersionFile file{file_of(handle), byte_start, static_cast<uint32_t>(place), seed};
    const uint64_t num_pages = num_rows / rows_per_page + (num_rows % rows_per_page != 0);
    require(num_rows >= 1 && num_rows < kNotPlaced && byte_start <= file.file.num_bytes &&
                num_pages <= (file.file.num_bytes - byte_start) / page_bytes,
            "a version's file holds its rows");
    overlay.files.push_back(file);
    place += num_rows;
    require(place < kNotPlaced, "places are below 2^32 - 1");
  }
  return record;
}

}  // namespace

RowOverlay checked_overlay(const OverlayRecord& record, size_t row_bytes) {
  const PageShape& shape = record.overlay.shape;
  require(shape.rows_per_page <= (shape.page_bytes - kTrailerBytes) / row_bytes, "a version's rows fit in its pages");
  RowOverlay overlay = record.overlay;
  overlay.row_bytes = row_bytes;
  return overlay;
}

void bind_overlay(py::module_& module) {
  module.attr("VERSION_SHIFT") = kVersionFileShift;
  module.attr("VERSION_READ") = kVersionRead;
  module.attr("VERSION_FILES_MAX") = kVersionFilesMax;
  module.def("clear_index", &clear_index_checked, py::arg("buckets").noconvert());
  module.def("put_rows", &put_rows_checked, py::arg("row_ids"), py::arg("place_start"), py::arg("buckets").noconvert());
  py::class_<OverlayRecord>(module, "OverlayRecord", py::module_local())
      .def(py::init(&make_overlay), py::kw_only(), py::arg("buckets").noconvert(), py::arg("files"),
           py::arg("page_bytes"), py::arg("rows_per_page"), py::arg("page_version"));
}

}  // namespace tierstore
