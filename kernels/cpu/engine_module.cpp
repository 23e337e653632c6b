#include "engine_module.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <tuple>

#include "py_engine.h"
#include "table_module.h"
#include "ticket_module.h"

namespace py = pybind11;

namespace tierstore {
namespace {

ReadMode mode_of(const std::string& name) {
  if (name == "uring") return ReadMode::kUring;
  if (name == "mmap") return ReadMode::kMmap;
  if (name == "pread") return ReadMode::kPread;
  if (name == "served") return ReadMode::kServed;
  throw std::invalid_argument("mode must be uring, mmap, pread or served");
}

PyEngine& py_engine_of(py::handle object) {
  if (!py::isinstance<PyEngine>(object)) throw py::type_error("engine must be an Engine");
  return object.cast<PyEngine&>();
}

}  // namespace

PyEngine::PyEngine(const std::vector<TableRecord>& records, const std::string& mode, bool use_process_madvise,
                   size_t num_readers, size_t num_threads, size_t part_bytes, size_t depth, size_t assembly_bytes,
                   size_t pread_threads, size_t jobs_max, double wait_s, const py::object& shared,
                   py::object make_fault, const std::pair<std::string, double>& served_by)
    : fault_names_(std::move(make_fault)), num_readers_(num_readers), mode_(mode_of(mode)) {
  require(num_readers >= 1 && num_threads >= 1 && part_bytes >= 1 && depth >= 1 && depth <= 4096 &&
              pread_threads >= 1 && jobs_max >= 1,
          "limits are at least 1");
  EngineShape shape{mode_,  use_process_madvise,       num_readers, num_threads, part_bytes, pread_threads, jobs_max,
                    wait_s, {depth, 0, assembly_bytes}};
  std::tie(shape.served_by, shape.served_wait_s) = served_by;
  std::vector<Table> tables;
  for (const TableRecord& record : records) {
    const Table& table = record.table;
    require(table.entry_bytes() <= assembly_bytes, "the assembly buffer holds an entry");
    shape.reader.page_bytes = std::max(shape.reader.page_bytes, table.read_bytes_max());
    if (table.statics.records != nullptr) {
      shape.reader.page_bytes = std::max(shape.reader.page_bytes, table.statics.placed.read_bytes_max());
    }
  }
  for (const TableRecord& record : records) {
    tables.push_back(open_table(record, shape.mode));
    memory_.push_back(record.memory);
    held_.insert(held_.end(), record.arrays.begin(), record.arrays.end());
  }
  if (!shared.is_none()) join(shared.cast<py::tuple>(), shape);
  engine_ = std::make_unique<Engine>(std::move(tables), shape);
}

PyEngine::~PyEngine() {
  bool ended;
  {
    const py::gil_scoped_release released;
    ended = close(engine_->wait_s());
    if (ended) engine_.reset();  // before the memory that it looks at
  }
  if (ended) return;
  // Its threads go on, and use all this.
  engine_.release();
  for (std::vector<py::array>* arrays : {&memory_, &held_, &gate_memory_}) {
    for (py::array& array : *arrays) array.release();
  }
}

void PyEngine::set_resident(size_t index, const std::vector<uint64_t>& bad_pages) {
  Table& table = engine_->tables().at(index);
  require(table.cache == nullptr, "the table has a cache");
  table.bad_pages.assign(bad_pages.empty() ? 0 : table.num_pages, false);
  for (const uint64_t page : bad_pages) table.bad_pages.at(page) = true;
  table.resident = static_cast<const uint8_t*>(memory_.at(index).data());
}

py::dict PyEngine::counters() const {
  py::dict all;
  const Counters& totals = engine_->counters;
  all["batches"] = totals.batches.load();
  all["zero_miss_batches"] = totals.zero_miss_batches.load();
  all["sentinels"] = totals.sentinels.load();
  all["rows"] = totals.rows.load();
  all["rows_missed"] = totals.rows_missed.load();
  all["pages_read"] = engine_->read_counters.pages.load();
  all["entries_read"] = engine_->read_counters.entries.load();
  all["bytes_read"] = engine_->read_counters.bytes.load();
  all["row_bytes_read"] = engine_->read_counters.row_bytes.load();
  py::list latency;
  for (const auto& count : engine_->latency.counts) latency.append(count.load());
  all["latency"] = py::make_tuple(latency, engine_->latency.sum_ns.load());
  py::list tables;
  for (const TableCounters& table : engine_->table_counters) {
    py::list hits, static_hits, misses;
    for (const auto& count : table.hits) hits.append(count.load());
    for (const auto& count : table.static_hits) static_hits.append(count.load());
    for (const auto& count : table.misses) misses.append(count.load());
    tables.append(py::make_tuple(hits, static_hits, misses));
  }
  all["tables"] = tables;
  return all;
}

std::vector<std::tuple<std::string, size_t, size_t>> PyEngine::shortfalls() const {
  std::vector<std::tuple<std::string, size_t, size_t>> found;
  if (engine_->num_readers() < num_readers_) found.emplace_back("readers", engine_->num_readers(), num_readers_);
  size_t files = 0, mapped = 0;
  const auto count = [&](const ShardFile& file) {
    files += file.buffered_fd >= 0;
    mapped += file.map != nullptr;
  };
  for (const Table& table : engine_->tables()) Table::each_file(table, count);
  if (mode_ == ReadMode::kMmap && mapped < files) found.emplace_back("memory maps of shards", mapped, files);
  return found;
}

void PyEngine::inject(const std::string& what, uint64_t first, uint64_t count) {
  engine_->faults.set(what, first, count);
}

bool PyEngine::close(double seconds) {
  const bool ended = engine_->close(seconds);
  if (ended) {
    const py::gil_scoped_acquire acquired;  // of several threads that close it, one at a time goes on
    for (Table& table : engine_->tables()) {
      Table::each_file(table, unmap);
    }
    // A closed store that somebody still names must not keep its budget.
    memory_.clear();
    held_.clear();
    for (Table& table : engine_->tables()) table.cache.reset();
  }
  return ended;
}

void PyEngine::join(const py::tuple& shared, EngineShape& shape) {
  auto control = shared[0].cast<py::array_t<uint8_t, py::array::c_style>>();
  auto block = shared[2].cast<py::array_t<uint8_t, py::array::c_style>>();
  shape.version = shared[1].cast<uint64_t>();
  require(control.nbytes() >= static_cast<py::ssize_t>(kControlBytes) && shape.version >= 1,
          "a control block has two lines");
  shape.reports = shared[3].cast<bool>();
  require(block.nbytes() >= static_cast<py::ssize_t>(kClientBlockBytes) && block.writeable(),
          "a client's block can be written");
  shape.epochs = EpochLine::at(const_cast<uint8_t*>(control.data()), shape.version % 2);
  shape.client_block = block.mutable_data();
  gate_memory_ = {std::move(control), std::move(block)};
}

Engine& engine_of(py::handle object) { return py_engine_of(object).engine(); }

py::object exception_of(py::handle engine, const Fault& fault) {
  return py_engine_of(engine).fault_names().exception(fault);
}

void bind_engine(py::module_& module) {
  bind_ticket(module);
  py::class_<PyEngine>(module, "Engine", py::module_local())
      .def(py::init<const std::vector<TableRecord>&, const std::string&, bool, size_t, size_t, size_t, size_t, size_t,
                    size_t, size_t, double, const py::object&, py::object, const std::pair<std::string, double>&>(),
           py::arg("tables"), py::kw_only(), py::arg("mode"), py::arg("use_process_madvise"), py::arg("num_readers"),
           py::arg("num_threads"), py::arg("part_bytes"), py::arg("depth"), py::arg("assembly_bytes"),
           py::arg("pread_threads"), py::arg("jobs_max"), py::arg("wait_s"), py::arg("shared"), py::arg("make_fault"),
           py::arg("served_by") = std::pair<std::string, double>{})
      .def("try_lookup", &PyEngine::try_lookup)
      .def("lookup", &PyEngine::lookup, py::arg("index"), py::arg("keys"), py::arg("out"),
           py::arg("sources") = py::none(), py::arg("seconds") = py::none())
      .def("submit", &PyEngine::submit)
      .def("submit_pairs", &PyEngine::submit_pairs)
      .def("rows", &PyEngine::rows, py::arg("index"), py::arg("row_ids"), py::arg("out"),
           py::arg("wanted") = py::none(), py::arg("seconds") = py::none())
      .def("submit_rows", &PyEngine::submit_rows, py::arg("index"), py::arg("row_ids"), py::arg("out"),
           py::arg("wanted") = py::none())
      .def("locate", &PyEngine::locate)
      .def("set_resident", &PyEngine::set_resident)
      .def("shortfalls", &PyEngine::shortfalls)
      .def("counters", &PyEngine::counters)
      .def("inject", &PyEngine::inject, py::arg("what"), py::arg("first") = 0, py::arg("count") = 1)
      .def("injected_reads", &PyEngine::injected_reads)
      .def("page_readers", &PyEngine::page_readers)
      .def("registered_readers", &PyEngine::registered_readers)
      .def("close", &PyEngine::close, py::arg("seconds"), py::call_guard<py::gil_scoped_release>())
      .def("before_fork", &PyEngine::before_fork)
      .def("after_fork", &PyEngine::after_fork);
  module.def("probe_uring", &probe_uring);
  module.def("probe_process_madvise", &probe_process_madvise);
}

}  // namespace tierstore
