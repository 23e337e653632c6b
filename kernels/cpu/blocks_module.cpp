// The Python face of planes and blocks: every number checked. kernels/_cpu.pyi says what each promises.
#include "blocks_module.h"

#include <pybind11/stl.h>

#include <limits>

#include "modules.h"

namespace py = pybind11;

namespace tierstore {
namespace {

constexpr size_t kStretchNumbers = 4;  // row_start, byte_start, block_start, file

py::array_t<uint32_t> block_checksums_checked(const ByteArray& data, int64_t block_start, uint32_t seed) {
  require(data.ndim() == 1 && block_start >= 0, "data must be [n], block_start not below 0");
  const auto num_bytes = static_cast<size_t>(data.size());
  py::array_t<uint32_t> out(static_cast<py::ssize_t>((num_bytes + kBlockBytes - 1) / kBlockBytes));
  const uint8_t* bytes = data.data();
  uint32_t* to = out.mutable_data();
  {
    const py::gil_scoped_release released;
    block_checksums(bytes, num_bytes, static_cast<uint64_t>(block_start), seed, to);
  }
  return out;
}

void set_files(PlaneSource& plane, const std::vector<FileHandle>& files) {
  require(!files.empty(), "a plane has files");
  for (const FileHandle& file : files) plane.files.push_back(file_of(file));
}

PlaneRecord make_blocks(size_t width_bytes, const std::vector<FileHandle>& files, const Int64Array& stretches,
                        UInt32Array checksums, uint32_t seed) {
  PlaneRecord record;
  PlaneSource& plane = record.plane;
  plane.width_bytes = width_bytes;
  plane.seed = seed;
  set_files(plane, files);
  require(stretches.ndim() == 2 && stretches.shape(0) >= 1 &&
              stretches.shape(1) == static_cast<py::ssize_t>(kStretchNumbers),
          "stretches must be [n, 4], at least one");
  for (py::ssize_t i = 0; i < stretches.shape(0); ++i) {
    for (size_t j = 0; j < kStretchNumbers; ++j) {
      require(stretches.at(i, j) >= 0, "a stretch's numbers are not below 0");
    }
    require(stretches.at(i, 3) < static_cast<int64_t>(files.size()), "a stretch lies in one of the files");
    plane.stretches.push_back({static_cast<uint64_t>(stretches.at(i, 0)), static_cast<uint64_t>(stretches.at(i, 1)),
                               static_cast<uint64_t>(stretches.at(i, 2)), static_cast<uint32_t>(stretches.at(i, 3))});
  }
  record.num_blocks = static_cast<uint64_t>(checksums.size());
  plane.checksums = checksums.data();
  record.arrays.push_back(std::move(checksums));
  return record;
}

PlaneRecord make_pages(size_t width_bytes, const std::vector<FileHandle>& files, size_t page_bytes,
                       size_t rows_per_page, uint64_t pages_per_shard, uint32_t page_version, uint32_t seed,
                       std::optional<ByteArray> resident) {
  PlaneRecord record;
  PlaneSource& plane = record.plane;
  plane.width_bytes = width_bytes;
  set_files(plane, files);
  require(width_bytes >= 1 && page_bytes > kTrailerBytes && rows_per_page >= 1 && pages_per_shard >= 1 &&
              rows_per_page <= (page_bytes - kTrailerBytes) / width_bytes,
          "a page's rows fit in it");
  plane.shape = {page_bytes, rows_per_page, page_version, seed};
  plane.pages_per_shard = pages_per_shard;
  if (resident) {
    plane.resident = resident->data();
    record.arrays.push_back(std::move(*resident));
  }
  return record;
}

void check_stretches(const PlaneRecord& record, uint64_t num_rows) {
  const PlaneSource& plane = record.plane;
  require(plane.stretches.front().row_start == 0, "the first stretch begins with row 0");
  for (size_t i = 0; i < plane.stretches.size(); ++i) {
    const Stretch& stretch = plane.stretches[i];
    const bool is_last = i + 1 == plane.stretches.size();
    const uint64_t row_end = is_last ? num_rows : plane.stretches[i + 1].row_start;
    const uint64_t num_bytes = plane.files[stretch.file].num_bytes;
    require(stretch.row_start < row_end && row_end <= num_rows, "stretches ascend, and end with the table");
    require(stretch.byte_start <= num_bytes &&
                row_end - stretch.row_start <= (num_bytes - stretch.byte_start) / plane.width_bytes,
            "a file holds its stretches");
    const uint64_t last_byte = stretch.byte_start % kBlockBytes + (row_end - stretch.row_start) * plane.width_bytes - 1;
    const uint64_t block_end = stretch.block_start + last_byte / kBlockBytes + 1;
    require(block_end <= (is_last ? record.num_blocks : plane.stretches[i + 1].block_start),
            "every block has a number and a checksum of its own");
  }
}

}  // namespace

std::vector<PlaneSource> checked_planes(const std::vector<PlaneRecord>& records, uint64_t num_rows, size_t row_bytes) {
  std::vector<PlaneSource> planes;
  size_t row_byte = 0;
  require(records.size() <= kPlanesMax, "a table in place has at most 64 planes");
  for (const PlaneRecord& record : records) {
    const PlaneSource& plane = record.plane;
    require(plane.width_bytes >= 1 && plane.width_bytes <= row_bytes - row_byte, "the planes make up a row");
    require(plane.width_bytes <= kWidthBytesMax, "a plane is as narrow as a page");
    if (plane.in_blocks()) {
      check_stretches(record, num_rows);
    } else {
      const uint64_t num_pages = (num_rows + plane.shape.rows_per_page - 1) / plane.shape.rows_per_page;
      require(plane.files.size() == (num_pages + plane.pages_per_shard - 1) / plane.pages_per_shard,
              "all shards of a plane are there");
      require(plane.resident == nullptr ||
                  static_cast<uint64_t>(record.arrays.front().nbytes()) >= num_rows * plane.width_bytes,
              "memory holds the plane's rows");
    }
    planes.push_back(plane);
    planes.back().row_byte = row_byte;
    row_byte += plane.width_bytes;
  }
  require(records.empty() || row_byte == row_bytes, "the planes make up a row");
  return planes;
}

void bind_blocks(py::module_& module) {
  module.attr("BLOCK_BYTES") = kBlockBytes;
  module.def("block_checksums", &block_checksums_checked, py::arg("data").noconvert(), py::arg("block_start"),
             py::arg("seed"));
  py::class_<PlaneRecord>(module, "PlaneRecord", py::module_local())
      .def_static("blocks", &make_blocks, py::kw_only(), py::arg("width_bytes"), py::arg("files"), py::arg("stretches"),
                  py::arg("checksums").noconvert(), py::arg("seed"))
      .def_static("pages", &make_pages, py::kw_only(), py::arg("width_bytes"), py::arg("files"), py::arg("page_bytes"),
                  py::arg("rows_per_page"), py::arg("pages_per_shard"), py::arg("page_version"), py::arg("seed"),
                  py::arg("resident") = py::none());
}

}  // namespace tierstore
