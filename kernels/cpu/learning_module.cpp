// The Python face of reports and counts: argument checks, then the work with the interpreter lock released.
// kernels/_cpu.pyi says what each promises.
#include <algorithm>
#include <utility>

#include "arrays.h"
#include "key_counts.h"
#include "modules.h"
#include "reports.h"

namespace py = pybind11;

namespace tierstore {
namespace {

constexpr const char* kMemoryWanted =
    "memory must be contiguous uint8, at a multiple of 64 bytes, whole lines of 64, one at least";
constexpr const char* kBlockWanted =
    "a client's block must be contiguous uint8 [CLIENT_BLOCK_BYTES], at a multiple of 64 bytes";

bool is_at_line(const void* data) { return reinterpret_cast<uintptr_t>(data) % 64 == 0; }

uint8_t* block_of(py::array& block) {
  uint8_t* data = output_of<uint8_t>(block, kBlockWanted);
  require(has_shape(block, {static_cast<py::ssize_t>(kClientBlockBytes)}) && is_at_line(data), kBlockWanted);
  return data;
}

class PyReportWriter {
 public:
  explicit PyReportWriter(py::array block) : block_(std::move(block)), writer_(block_of(block_)) {
    require(ClientBlock::of(block_of(block_))->magic.load(std::memory_order_acquire) == kClientBlockMagic,
            "a client's block must have been through init_client_block of the same version");
  }
  void add(const Input<Report>& reports) {
    require(reports.ndim() == 1, "reports must be [reports]");
    const Report* data = reports.data();
    const auto num_reports = static_cast<size_t>(reports.size());
    py::gil_scoped_release released;
    writer_.add(data, num_reports);
  }

 private:
  py::array block_;  // keeps it mapped
  ReportWriter writer_;
};

class PyReportReader {
 public:
  explicit PyReportReader(py::array block) : block_(std::move(block)), reader_(block_of(block_)) {}
  // Keeps the interpreter lock, by which calls come one at a time: a whole ring is over in less than a hand-over of the
  // lock takes.
  size_t take(py::array& out) {
    require(out.ndim() == 1, "out must be [reports]");
    Report* reports = output_of<Report>(out, "out must be contiguous, of type REPORT");
    return reader_.take(reports, static_cast<size_t>(out.size()));
  }
  uint64_t lost() const { return reader_.lost(); }
  uint64_t dropped() const { return reader_.dropped(); }

 private:
  py::array block_;
  ReportReader reader_;
};

class PyKeyCounts {
 public:
  explicit PyKeyCounts(py::array memory)
      : memory_(std::move(memory)), counts_(data_of(memory_), num_sets_of(memory_)) {}

  size_t add(const Input<Report>& reports) {
    require(reports.ndim() == 1, "reports must be [reports]");
    const Report* data = reports.data();
    const auto num_reports = static_cast<size_t>(reports.size());
    py::gil_scoped_release released;
    return counts_.add(data, num_reports);
  }

  py::array_t<uint32_t> counts(uint16_t table, const Input<uint8_t>& order_index, const Input<int64_t>& keys) const {
    require(has_shape(order_index, {keys.size()}), "order_index and keys must be [keys]");
    return counts_of(table, order_index.data(), false, keys);
  }
  py::array_t<uint32_t> counts_of_order(uint16_t table, uint8_t order_index, const Input<int64_t>& keys) const {
    return counts_of(table, &order_index, true, keys);
  }

  // The room is made between counting and copying, so that no lock is held while the interpreter's is waited for. What
  // has become of the counts meanwhile shows in how much of the room is used.
  py::tuple above(uint16_t table, uint32_t count_min, size_t set_start, size_t set_end) const {
    require(count_min >= 1, "count_min must be at least 1");
    const SetRange sets{set_start, set_end};
    py::ssize_t size = 0;
    {
      py::gil_scoped_release released;
      size = static_cast<py::ssize_t>(counts_.num_above(table, count_min, sets));
    }
    py::array_t<uint8_t> order_index(size);
    py::array_t<int64_t> keys(size);
    py::array_t<uint32_t> counts(size);
    const CountedKeys out{order_index.mutable_data(), keys.mutable_data(), counts.mutable_data(),
                          static_cast<size_t>(size)};
    py::ssize_t num_found = 0;
    {
      py::gil_scoped_release released;
      num_found = static_cast<py::ssize_t>(counts_.copy_above(table, count_min, sets, out));
    }
    if (num_found < size) {
      for (py::array* each :
           {static_cast<py::array*>(&order_index), static_cast<py::array*>(&keys), static_cast<py::array*>(&counts)}) {
        each->resize({num_found});
      }
    }
    return py::make_tuple(order_index, keys, counts);
  }

  void age() {
    py::gil_scoped_release released;
    counts_.age();
  }
  size_t num_used() const {
    py::gil_scoped_release released;
    return counts_.num_used();
  }
  size_t num_sets() const { return counts_.num_sets(); }

 private:
  static uint8_t* data_of(py::array& memory) {
    uint8_t* data = output_of<uint8_t>(memory, kMemoryWanted);
    require(memory.ndim() == 1 && memory.size() > 0 && memory.size() % 64 == 0 && is_at_line(data), kMemoryWanted);
    return data;
  }
  static size_t num_sets_of(const py::array& memory) {
    return static_cast<size_t>(memory.size()) / sizeof(KeyCountSet);
  }

  py::array_t<uint32_t> counts_of(uint16_t table, const uint8_t* orders, bool one_order,
                                  const Input<int64_t>& keys) const {
    require(keys.ndim() == 1, "keys must be [keys]");
    py::array_t<uint32_t> found(keys.size());
    const int64_t* data = keys.data();
    uint32_t* out = found.mutable_data();
    const auto num_keys = static_cast<size_t>(keys.size());
    {
      py::gil_scoped_release released;
      counts_.counts(table, orders, one_order, data, num_keys, out);
    }
    return found;
  }

  py::array memory_;  // keeps it there
  KeyCounts counts_;
};

}  // namespace

void bind_learning(py::module_& module) {
  PYBIND11_NUMPY_DTYPE(Report, key, table, order, source_and_weight);
  module.def("init_client_block", [](py::array block) { init_client_block(block_of(block)); }, py::arg("block"));
  py::class_<PyReportWriter>(module, "ReportWriter", py::module_local())
      .def(py::init<py::array>(), py::arg("block"))
      .def("add", &PyReportWriter::add, py::arg("reports"));
  py::class_<PyReportReader>(module, "ReportReader", py::module_local())
      .def(py::init<py::array>(), py::arg("block"))
      .def("take", &PyReportReader::take, py::arg("out"))
      .def_property_readonly("lost", &PyReportReader::lost)
      .def_property_readonly("dropped", &PyReportReader::dropped);
  py::class_<PyKeyCounts>(module, "KeyCounts", py::module_local())
      .def(py::init<py::array>(), py::arg("memory"))
      .def("add", &PyKeyCounts::add, py::arg("reports"))
      .def("counts", &PyKeyCounts::counts_of_order, py::arg("table"), py::arg("order_index"), py::arg("keys"))
      .def("counts", &PyKeyCounts::counts, py::arg("table"), py::arg("order_index"), py::arg("keys"))
      .def("above", &PyKeyCounts::above, py::arg("table"), py::arg("count_min"), py::arg("set_start") = 0,
           py::arg("set_end") = SIZE_MAX)
      .def("age", &PyKeyCounts::age)
      .def_property_readonly("num_used", &PyKeyCounts::num_used)
      .def_property_readonly("num_sets", &PyKeyCounts::num_sets);
}

}  // namespace tierstore
