// The Python face of training records at rest: where they lie, and reading them. kernels/_cpu.pyi says what each
// promises.
#include <fcntl.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <utility>

#include "arrays.h"
#include "modules.h"
#include "row_places.h"
#include "run_reader.h"

namespace py = pybind11;

namespace tierstore {
namespace {

using UInt16Array = py::array_t<uint16_t, py::array::c_style>;

// A descriptor of our own: the caller's stays its own, whatever interrupts it.
int copy_of(int fd) {
  const int copy = fcntl(fd, F_DUPFD_CLOEXEC, 0);
  if (copy < 0) {
    PyErr_SetFromErrno(PyExc_OSError);
    throw py::error_already_set();
  }
  return copy;
}

void require_rows(const Int64Array& row_ids, uint64_t num_rows) {
  require(row_ids.ndim() == 1, "row_ids must be [n]");
  const int64_t* ids = row_ids.data();
  for (py::ssize_t i = 0; i < row_ids.shape(0); ++i) {
    require(ids[i] >= 0 && static_cast<uint64_t>(ids[i]) < num_rows, "row ids must be 0 or more, and below num_rows");
  }
}

void require_places(const Int64Array& row_ids, const UInt16Array& runs, const UInt32Array& places) {
  require(has_shape(runs, {row_ids.shape(0)}) && has_shape(places, {row_ids.shape(0)}),
          "runs and places must be [n], as row_ids");
}

void require_target(uint32_t run, uint32_t place_start, py::ssize_t count) {
  require(run < kNoRun, "run must be below 65535");
  require(uint64_t{place_start} + static_cast<uint64_t>(count) <= kNoPlace, "places must be below 2^32 - 1");
}

std::shared_ptr<RowPlaces> make_places(uint64_t num_rows) {
  require(num_rows <= RowPlaces::kRowsMax, "num_rows must be below 2^48");
  return std::make_shared<RowPlaces>(num_rows);
}

void put_places(RowPlaces& self, const Int64Array& row_ids, uint32_t run, uint32_t place_start) {
  require_rows(row_ids, self.num_rows());
  require_target(run, place_start, row_ids.shape(0));
  const int64_t* ids = row_ids.data();
  const auto count = static_cast<size_t>(row_ids.shape(0));
  const py::gil_scoped_release released;
  self.put(ids, count, static_cast<uint16_t>(run), place_start);
}

size_t find_places(const RowPlaces& self, const Int64Array& row_ids, UInt16Array runs, UInt32Array places) {
  require_rows(row_ids, self.num_rows());
  require_places(row_ids, runs, places);
  const int64_t* ids = row_ids.data();
  uint16_t* to_runs = runs.mutable_data();
  uint32_t* to_places = places.mutable_data();
  const auto count = static_cast<size_t>(row_ids.shape(0));
  const py::gil_scoped_release released;
  return self.find(ids, count, to_runs, to_places);
}

size_t move_places(RowPlaces& self, const Int64Array& row_ids, const UInt16Array& runs, const UInt32Array& places,
                   uint32_t run, uint32_t place_start) {
  require_rows(row_ids, self.num_rows());
  require_places(row_ids, runs, places);
  require_target(run, place_start, row_ids.shape(0));
  const int64_t* ids = row_ids.data();
  const uint16_t* from_runs = runs.data();
  const uint32_t* from_places = places.data();
  const auto count = static_cast<size_t>(row_ids.shape(0));
  const py::gil_scoped_release released;
  return self.move(ids, from_runs, from_places, count, static_cast<uint16_t>(run), place_start);
}

const char* name_of(RunFaultKind kind) {
  switch (kind) {
    case RunFaultKind::kNoRun:
      return "no run";
    case RunFaultKind::kDisk:
      return "disk";
    case RunFaultKind::kDamaged:
      return "damaged";
    case RunFaultKind::kOtherRow:
      return "other row";
    case RunFaultKind::kTimeout:
      return "timeout";
    default:
      return "interrupted";
  }
}

class PyRunReader {
 public:
  PyRunReader(size_t record_bytes, uint32_t seed, size_t depth, size_t read_bytes, size_t num_calls,
              const std::string& mode) {
    require(record_bytes > 0 && record_bytes % 8 == 0, "record_bytes must be a multiple of 8");
    require(depth > 0 && depth <= 4096 && num_calls > 0 && num_calls <= 256, "depth to 4096, num_calls to 256");
    const RecordShape record{record_bytes, record_bytes + kRecordTrailerBytes, seed};
    require(read_bytes % kReadUnitBytes == 0 && read_bytes >= record.record_bytes + kReadUnitBytes,
            "read_bytes must be whole units of 4096, and hold a record wherever it begins");
    require(mode == "uring" || mode == "pread", "mode must be uring or pread");
    const RunReaderShape shape{record, depth, read_bytes, num_calls};
    record_bytes_ = record_bytes;
    reader_ = std::make_unique<RunReader>(shape, mode == "uring" ? ReadMode::kUring : ReadMode::kPread);
  }

  void add(uint32_t ordinal, uint32_t number, int fd, int direct_fd, uint64_t byte_start, uint32_t num_records) {
    require(ordinal < kNoRun, "an ordinal is below 65535");
    auto run = std::make_shared<RunFile>();
    run->number = number;
    run->byte_start = byte_start;
    run->num_records = num_records;
    run->file.buffered_fd = copy_of(fd);
    run->file.direct_fd = direct_fd < 0 ? -1 : copy_of(direct_fd);
    reader_->add(static_cast<uint16_t>(ordinal), std::move(run));
  }

  void remove(uint32_t ordinal) { reader_->remove(static_cast<uint16_t>(ordinal)); }

  // Returns what went wrong: (kind, ordinal, place, row id, detail); None if nothing did.
  py::object read(const Int64Array& row_ids, const UInt16Array& runs, const UInt32Array& places, py::array out) {
    require(row_ids.ndim() == 1, "row_ids must be [n]");
    require_places(row_ids, runs, places);
    require(py::isinstance<py::array_t<uint8_t>>(out) && has_shape(out, {row_ids.shape(0), as_signed(record_bytes_)}) &&
                out.writeable() && (out.shape(0) == 0 || (out.strides(1) == 1 && out.strides(0) >= out.shape(1))),
            "out must be writable uint8 [n, record_bytes], each row contiguous, none over another");
    auto* to = static_cast<uint8_t*>(out.mutable_data());
    const auto stride = static_cast<size_t>(out.strides(0));
    const auto interrupted = [] {
      const py::gil_scoped_acquire acquired;
      return PyErr_CheckSignals() != 0;
    };
    RunFault fault;
    {
      const py::gil_scoped_release released;
      fault = reader_->read(row_ids.data(), runs.data(), places.data(), static_cast<size_t>(row_ids.shape(0)), to,
                            stride, interrupted);
    }
    if (PyErr_Occurred() != nullptr) throw py::error_already_set();
    if (fault.kind == RunFaultKind::kNone) return py::none();
    return py::make_tuple(name_of(fault.kind), fault.run, fault.place, fault.row_id, fault.detail);
  }

  void inject(const std::string& what, uint64_t first, uint64_t count) { reader_->faults().set(what, first, count); }
  size_t num_bytes() const { return reader_->num_bytes(); }
  std::pair<uint64_t, uint64_t> counts() const { return {reader_->num_reads(), reader_->num_bytes_read()}; }

 private:
  static py::ssize_t as_signed(size_t value) { return static_cast<py::ssize_t>(value); }

  size_t record_bytes_;
  std::unique_ptr<RunReader> reader_;
};

}  // namespace

void bind_runs(py::module_& module) {
  py::class_<RowPlaces, std::shared_ptr<RowPlaces>>(module, "RowPlaces")
      .def(py::init(&make_places), py::arg("num_rows"))
      .def("put", &put_places, py::arg("row_ids"), py::arg("run"), py::arg("place_start"))
      .def("find", &find_places, py::arg("row_ids"), py::arg("runs").noconvert(), py::arg("places").noconvert())
      .def("move", &move_places, py::arg("row_ids"), py::arg("runs"), py::arg("places"), py::arg("run"),
           py::arg("place_start"))
      .def("live", &RowPlaces::live, py::arg("run"))
      .def_property_readonly("num_found", &RowPlaces::num_found)
      .def_property_readonly("num_bytes", &RowPlaces::num_bytes)
      .def("num_bytes_with", &RowPlaces::num_bytes_with, py::arg("num_more"));
  py::class_<PyRunReader>(module, "RunRecords")
      .def(py::init<size_t, uint32_t, size_t, size_t, size_t, const std::string&>(), py::arg("record_bytes"),
           py::arg("seed"), py::arg("depth"), py::arg("read_bytes"), py::arg("num_calls"), py::arg("mode"))
      .def("add", &PyRunReader::add, py::arg("ordinal"), py::arg("number"), py::arg("fd"), py::arg("direct_fd"),
           py::arg("byte_start"), py::arg("num_records"))
      .def("remove", &PyRunReader::remove, py::arg("ordinal"))
      .def("read", &PyRunReader::read, py::arg("row_ids"), py::arg("runs"), py::arg("places"),
           py::arg("out").noconvert())
      .def("inject", &PyRunReader::inject, py::arg("what"), py::arg("first") = 0, py::arg("count") = 1)
      .def_property_readonly("num_bytes", &PyRunReader::num_bytes)
      .def_property_readonly("counts", &PyRunReader::counts);
}

}  // namespace tierstore
