// The Python face of the lookup path: checks arguments, holds what must outlive a job, and releases the interpreter lock.
#include "engine_module.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <chrono>
#include <cmath>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>


#include "engine.h"
#include "table_module.h"

namespace py = pybind11;

namespace tierstore {
namespace {

// Copies of so few entries are over sooner than the interpreter lock is given back and taken again: with 64 threads that
// look up one token each, doing so made every lookup five times dearer. Whatever reads from disk releases it.
constexpr size_t kBriefPairs = 16;
constexpr int kWaitSliceMs = 200;  // how often a wait lets Python handle signals

ReadMode mode_of(const std::string& name) {
  if (name == "uring") return ReadMode::kUring;
  if (name == "mmap") return ReadMode::kMmap;
  if (name == "pread") return ReadMode::kPread;
  throw std::invalid_argument("mode must be uring, mmap or pread");
}

bool is_array(py::handle object, char kind, py::ssize_t itemsize, bool writeable) {
  if (!py::isinstance<py::array>(object)) return false;
  const auto array = py::reinterpret_borrow<py::array>(object);
  const py::dtype dtype = array.dtype();
  const char order = dtype.byteorder();
  return dtype.kind() == kind && dtype.itemsize() == itemsize && (order == '=' || order == '|') &&
         (array.flags() & py::array::c_style) != 0 && (!writeable || array.writeable());
}

// A job submitted from Python. Whoever made it keeps the output buffers alive until it is done.
class Ticket {
 public:
  explicit Ticket(std::shared_ptr<Job> job) : job_(std::move(job)) {}

  bool done() { return job_->is_done(); }

  // Returns False where the time ran out, else the fault or None.
  py::object wait(double seconds) {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(std::min(seconds, 1e9));
    for (;;) {
      const std::chrono::duration<double> left = deadline - std::chrono::steady_clock::now();
      bool done;
      {
        py::gil_scoped_release released;
        done = job_->wait(std::max(0.0, std::min(left.count(), kWaitSliceMs / 1000.0)));
      }
      if (done) return fault_tuple(job_->fault);
      if (left.count() <= 0) return py::bool_(false);
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    }
  }

 private:
  std::shared_ptr<Job> job_;
};

class PyEngine {
 public:
  PyEngine(const std::vector<py::dict>& records, const std::string& mode, bool use_process_madvise, size_t num_lanes,
           size_t depth, size_t assembly_bytes, size_t pread_threads, size_t jobs_max, double wait_s, const py::object& shared) {
    num_lanes_ = num_lanes;
    mode_ = mode_of(mode);
    require(num_lanes >= 1 && depth >= 1 && depth <= 4096 && pread_threads >= 1 && jobs_max >= 1, "limits are at least 1");
    EngineShape shape{mode_of(mode), use_process_madvise, num_lanes, pread_threads, jobs_max, wait_s, {depth, 0, assembly_bytes}};
    std::vector<Table> tables;
    for (const py::dict& record : records) {
      tables.push_back(make_table(record, shape.mode));
      Table& table = tables.back();
      shape.lane.page_bytes = std::max(shape.lane.page_bytes, (table.page_bytes + 4095) / 4096 * 4096);
      require(table.entry_bytes() <= assembly_bytes, "the assembly buffer holds an entry");
      if (py::isinstance<HeldCache>(record["memory"])) {
        const auto& held = record["memory"].cast<const HeldCache&>();
        require(held.cache->entry_bytes() == table.entry_bytes(), "the cache is one of such entries");
        table.cache = held.cache;
        memory_.push_back(held.memory);
      } else {
        memory_.push_back(record["memory"].cast<py::array_t<uint8_t, py::array::c_style>>());
        require(static_cast<uint64_t>(memory_.back().nbytes()) >= table.num_rows * table.row_bytes, "memory holds the resident rows");
      }
      if (!record["statics"].is_none()) {
        require(table.cache != nullptr, "a resident table needs no static set");
        table.statics = make_statics(record["statics"].cast<py::dict>(), table, shape.mode, held_);
        shape.lane.page_bytes = std::max(shape.lane.page_bytes, table.statics.placed.read_bytes_max());
      }
    }
    if (!shared.is_none()) join(shared.cast<py::tuple>(), shape);
    engine_ = std::make_unique<Engine>(std::move(tables), shape);
  }

  ~PyEngine() {
    py::gil_scoped_release released;
    close(0);
    engine_.reset();
  }

  // None: done. False: the arguments, or the state, need Python's look. A tuple: a fault.
  py::object lookup(size_t index, py::handle keys, py::handle out) {
    if (!fits(index, keys, out)) return py::bool_(false);
    const auto key_array = py::reinterpret_borrow<py::array>(keys);
    const auto num_tokens = static_cast<size_t>(key_array.shape(0));
    const auto* key_data = static_cast<const int64_t*>(key_array.data());
    auto* out_data = static_cast<uint8_t*>(py::reinterpret_borrow<py::array>(out).mutable_data());
    Job job;
    bool good;
    const auto started = Latency::begin();
    {
      std::optional<py::gil_scoped_release> released;
      if (num_tokens * engine_->tables()[index].num_orders > kBriefPairs) released.emplace();
      const Engine::Use use(*engine_);
      good = use && pairs_are_good(engine_->tables()[index], {key_data, num_tokens * engine_->tables()[index].num_orders});
      if (good) {
        engine_->gather(use.view(), index, key_data, num_tokens, out_data, job);
        engine_->count_batch(job);
        if (!job.misses.empty() && !released) released.emplace();
        engine_->fetch(job);
      }
    }
    if (good) engine_->latency.end(started);
    return good ? fault_tuple(job.fault) : py::bool_(false);
  }

  // [(table, keys, out), ...], checked. Returns a Ticket, None where nothing was missing, or False as `lookup` does.
  py::object submit(const std::vector<std::tuple<size_t, py::object, py::object>>& requests) {
    for (const auto& [index, keys, out] : requests) {
      if (!fits(index, keys, out)) return py::bool_(false);
    }
    std::vector<Part> parts;
    for (const auto& [index, keys, out] : requests) {
      const auto key_array = py::reinterpret_borrow<py::array>(keys);
      parts.push_back({index, {static_cast<const int64_t*>(key_array.data()), static_cast<size_t>(key_array.size())},
                       static_cast<uint8_t*>(py::reinterpret_borrow<py::array>(out).mutable_data())});
    }
    return start(parts);
  }

  // keys, int64 [M], and their pairs, int32 [M], of one table into out, uint8 [M, entry_bytes]. Returns as `submit` does.
  py::object submit_pairs(size_t index, py::handle keys, py::handle pairs, py::handle out) {
    if (index >= engine_->tables().size() || !is_array(keys, 'i', 8, false) || !is_array(pairs, 'i', 4, false) ||
        !is_array(out, 'u', 1, true)) {
      return py::bool_(false);
    }
    const Table& table = engine_->tables()[index];
    const auto k = py::reinterpret_borrow<py::array>(keys), p = py::reinterpret_borrow<py::array>(pairs);
    auto o = py::reinterpret_borrow<py::array>(out);
    const auto count = static_cast<size_t>(k.size());
    if (k.ndim() != 1 || p.ndim() != 1 || p.size() != k.size() || count > std::numeric_limits<uint32_t>::max() || o.ndim() != 2 ||
        o.shape(0) != k.size() || o.shape(1) != static_cast<py::ssize_t>(table.entry_bytes()) ||
        (table.cache == nullptr && table.resident == nullptr)) {
      return py::bool_(false);
    }
    const PairList list{static_cast<const int64_t*>(k.data()), count, static_cast<const int32_t*>(p.data())};
    return start({{index, list, static_cast<uint8_t*>(o.mutable_data())}});
  }

  // Row ids, int64 [R], -1 for a zero row, into uint8 [R, row_bytes], past the cache. Returns as `lookup` does. Those of whole tokens
  // of a resident table, [N, O * H], are counted as keys.
  py::object rows(size_t index, py::handle row_ids, py::handle out) {
    const Table& table = engine_->tables().at(index);
    return read_units(index, row_ids, out, table.row_bytes, table.num_rows, kRowUnit);
  }

  // Pages, int64 [P], all different, into uint8 [P, page_bytes]. Returns as `lookup` does.
  py::object read_pages(size_t index, py::handle page_numbers, py::handle out) {
    const Table& table = engine_->tables().at(index);
    return read_units(index, page_numbers, out, table.page_bytes, table.num_pages, kPageUnit);
  }

  // Says that a resident table's memory holds its rows now, but for those of some pages. Comes before its first lookup.
  void set_resident(size_t index, const std::vector<uint64_t>& bad_pages) {
    Table& table = engine_->tables().at(index);
    require(table.cache == nullptr, "the table has a cache");
    table.bad_pages.assign(bad_pages.empty() ? 0 : table.num_pages, false);
    for (const uint64_t page : bad_pages) table.bad_pages.at(page) = true;
    table.resident = static_cast<const uint8_t*>(memory_.at(index).data());
  }

  // What would answer keys, int64 [N, O], as uint8 [N, O] in `sources`. Returns None, or False as `lookup` does.
  py::object locate(size_t index, py::handle keys, py::handle sources) {
    if (index >= engine_->tables().size() || !is_array(keys, 'i', 8, false) || !is_array(sources, 'u', 1, true)) return py::bool_(false);
    const Table& table = engine_->tables()[index];
    const auto key_array = py::reinterpret_borrow<py::array>(keys);
    auto source_array = py::reinterpret_borrow<py::array>(sources);
    if (key_array.ndim() != 2 || key_array.shape(1) != static_cast<py::ssize_t>(table.num_orders) ||
        source_array.nbytes() != key_array.size() || (table.cache == nullptr && table.resident == nullptr)) {
      return py::bool_(false);
    }
    const auto* key_data = static_cast<const int64_t*>(key_array.data());
    auto* out = static_cast<uint8_t*>(source_array.mutable_data());
    const auto num_tokens = static_cast<size_t>(key_array.shape(0));
    bool open;
    {
      const py::gil_scoped_release released;
      const Engine::Use use(*engine_);
      open = static_cast<bool>(use);
      if (open) engine_->locate(use.view(), index, key_data, num_tokens, out);
    }
    if (!open) return py::bool_(false);
    return py::none();
  }

  // {"batches": ..., "tables": [(hits by order, hits in the static set by order, misses by order), ...]}
  py::dict counters() const {
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

  // What could not be had, and is made do without: [(what, how many there are, how many were wanted), ...]
  std::vector<std::tuple<std::string, size_t, size_t>> shortfalls() const {
    std::vector<std::tuple<std::string, size_t, size_t>> found;
    if (engine_->num_lanes() < num_lanes_) found.emplace_back("lanes", engine_->num_lanes(), num_lanes_);
    size_t files = 0, mapped = 0;
    const auto count = [&](const ShardFile& file) {
      files += file.buffered_fd >= 0;
      mapped += file.map != nullptr;
    };
    for (const Table& table : engine_->tables()) {
      for (const ShardFile& shard : table.shards) count(shard);
      count(table.statics.placed.file);
    }
    if (mode_ == ReadMode::kMmap && mapped < files) found.emplace_back("memory maps of shards", mapped, files);
    return found;
  }

  void inject(const std::string& what, uint64_t first, uint64_t count) {
    static const char* const kNames[] = {"none", "failing", "short", "corrupt", "slow"};
    for (int i = 0; i < 5; ++i) {
      if (what == kNames[i]) {
        engine_->faults.set(static_cast<FaultInjection>(i), first, count);
        return;
      }
    }
    throw std::invalid_argument("what must be none, failing, short, corrupt or slow");
  }

  uint64_t injected_reads() const { return engine_->faults.seen(); }

  // Waits; returns whether all lookups ended in time. Files may be closed, and buffers let go, only then.
  bool close(double seconds) {
    const bool ended = engine_->close(seconds);
    if (ended) {
      const py::gil_scoped_acquire acquired;  // of several threads that close it, one at a time goes on
      for (Table& table : engine_->tables()) {
        for (ShardFile& shard : table.shards) unmap(shard);
        unmap(table.statics.placed.file);
      }
      // A closed store that somebody still names must not keep its budget.
      memory_.clear();
      held_.clear();
      for (Table& table : engine_->tables()) table.cache.reset();
    }
    return ended;
  }

  Engine& engine() { return *engine_; }

  void before_fork() { engine_->before_fork(); }
  void after_fork(bool in_child) { engine_->after_fork(in_child); }

 private:
  // One table's part of a lookup.
  struct Part {
    size_t index;
    PairList list;
    uint8_t* out;
  };

  // Gathers, and submits what is missing. Returns as `submit` does.
  py::object start(const std::vector<Part>& parts) {
    auto job = std::make_shared<Job>();
    job->started = Latency::begin();
    bool good;
    {
      const py::gil_scoped_release released;
      const Engine::Use use(*engine_);
      good = static_cast<bool>(use);
      for (const Part& part : parts) good = good && pairs_are_good(engine_->tables()[part.index], part.list);
      if (good) {
        for (const Part& part : parts) engine_->gather(use.view(), part.index, part.list, part.out, *job);
        engine_->count_batch(*job);
        if (job->fault.kind != FaultKind::kNone) {
          job->finish();
        } else if (!job->misses.empty()) {
          engine_->submit(job);
        }
      }
    }
    if (!good) return py::bool_(false);
    if (job->misses.empty()) engine_->latency.end(job->started);
    if (job->misses.empty() && job->fault.kind == FaultKind::kNone) return py::none();
    return py::cast(Ticket(std::move(job)));
  }

  // Attaches the engine to a daemon's epochs: (control block, number of the version, the client's own block, whether to report there).
  void join(const py::tuple& shared, EngineShape& shape) {
    auto control = shared[0].cast<py::array_t<uint8_t, py::array::c_style>>();
    auto block = shared[2].cast<py::array_t<uint8_t, py::array::c_style>>();
    shape.version = shared[1].cast<uint64_t>();
    require(control.nbytes() >= static_cast<py::ssize_t>(kControlBytes) && shape.version >= 1, "a control block has two lines");
    shape.reports = shared[3].cast<bool>();
    require(block.nbytes() >= static_cast<py::ssize_t>(kClientBlockBytes) && block.writeable(), "a client's block can be written");
    shape.epochs = EpochLine::at(const_cast<uint8_t*>(control.data()), shape.version % 2);
    shape.client_block = block.mutable_data();
    gate_memory_ = {std::move(control), std::move(block)};
  }

  // Says whether keys are int64 [N, O] and out uint8 [N, O * H, row_bytes], contiguous.
  bool fits(size_t index, py::handle keys, py::handle out) const {
    if (index >= engine_->tables().size() || !is_array(keys, 'i', 8, false) || !is_array(out, 'u', 1, true)) return false;
    const Table& table = engine_->tables()[index];
    if (table.cache == nullptr && table.resident == nullptr) return false;
    const auto k = py::reinterpret_borrow<py::array>(keys);
    const auto o = py::reinterpret_borrow<py::array>(out);
    return k.ndim() == 2 && o.ndim() == 3 && k.shape(1) == static_cast<py::ssize_t>(table.num_orders) &&
           k.size() <= std::numeric_limits<uint32_t>::max() && o.shape(0) == k.shape(0) &&
           o.shape(1) == static_cast<py::ssize_t>(table.num_heads()) && o.shape(2) == static_cast<py::ssize_t>(table.row_bytes);
  }

  static bool pairs_are_good(const Table& table, const PairList& list) {
    const int64_t end = table.is_plain ? static_cast<int64_t>(table.num_rows) : std::numeric_limits<int64_t>::max();
    bool good = true;
    for (size_t i = 0; i < list.count; ++i) {
      good &= list.keys[i] >= -1 && (list.keys[i] < end || !table.is_plain);
    }
    for (size_t i = 0; list.pairs != nullptr && i < list.count; ++i) good &= list.pairs[i] >= 0;
    return good;
  }

  py::object read_units(size_t index, py::handle ids, py::handle out, size_t unit_bytes, uint64_t num_units, uint8_t unit) {
    if (!is_array(ids, 'i', 8, false) || !is_array(out, 'u', 1, true)) return py::bool_(false);
    const auto id_array = py::reinterpret_borrow<py::array>(ids);
    const auto out_array = py::reinterpret_borrow<py::array>(out);
    const auto count = static_cast<size_t>(id_array.size());
    if (static_cast<size_t>(out_array.nbytes()) != count * unit_bytes || count > std::numeric_limits<uint32_t>::max()) {
      return py::bool_(false);
    }
    const auto* id_data = static_cast<const int64_t*>(id_array.data());
    auto* out_data = static_cast<uint8_t*>(py::reinterpret_borrow<py::array>(out).mutable_data());
    const bool of_tokens = id_array.ndim() == 2 && id_array.shape(1) == static_cast<py::ssize_t>(engine_->tables()[index].num_heads());
    Job job;
    bool good;
    const auto started = unit == kRowUnit ? Latency::begin() : Latency::Clock::time_point{};
    {
      const py::gil_scoped_release released;
      const Engine::Use use(*engine_);
      good = static_cast<bool>(use);
      for (size_t i = 0; i < count; ++i) {
        good &= id_data[i] >= (unit == kRowUnit ? -1 : 0) && id_data[i] < static_cast<int64_t>(num_units);
      }
      if (good) engine_->read(index, id_data, count, out_data, unit, of_tokens, job);
    }
    if (good) engine_->latency.end(started);
    return good ? fault_tuple(job.fault) : py::bool_(false);
  }

  std::unique_ptr<Engine> engine_;
  size_t num_lanes_ = 0;
  ReadMode mode_ = ReadMode::kPread;
  std::vector<py::array> memory_;  // of each table, in their order
  std::vector<py::array> held_;    // what static sets lie in
  std::vector<py::array> gate_memory_;  // what epochs are seen and counted in, also by lookups that come after `close`
};

}  // namespace

Engine& engine_of(py::handle object) {
  if (!py::isinstance<PyEngine>(object)) throw py::type_error("engine must be an Engine");
  return object.cast<PyEngine&>().engine();
}

py::object fault_tuple(const Fault& fault) {
  static const char* const kNames[] = {"none", "page", "disk", "timeout", "forked", "entry"};
  if (fault.kind == FaultKind::kNone) return py::none();
  return py::make_tuple(kNames[static_cast<int>(fault.kind)], fault.table, fault.page, fault.detail);
}

void bind_engine(py::module_& module) {
  py::class_<Ticket>(module, "Ticket", py::module_local()).def("done", &Ticket::done).def("wait", &Ticket::wait, py::arg("seconds"));
  py::class_<PyEngine>(module, "Engine", py::module_local())
      .def(py::init<const std::vector<py::dict>&, const std::string&, bool, size_t, size_t, size_t, size_t, size_t, double, const py::object&>(),
           py::arg("tables"), py::kw_only(), py::arg("mode"), py::arg("use_process_madvise"), py::arg("num_lanes"),
           py::arg("depth"), py::arg("assembly_bytes"), py::arg("pread_threads"), py::arg("jobs_max"), py::arg("wait_s"),
           py::arg("shared") = py::none())
      .def("lookup", &PyEngine::lookup)
      .def("submit", &PyEngine::submit)
      .def("submit_pairs", &PyEngine::submit_pairs)
      .def("rows", &PyEngine::rows)
      .def("read_pages", &PyEngine::read_pages)
      .def("set_resident", &PyEngine::set_resident)
      .def("locate", &PyEngine::locate)
      .def("shortfalls", &PyEngine::shortfalls)
      .def("counters", &PyEngine::counters)
      .def("inject", &PyEngine::inject, py::arg("what"), py::arg("first") = 0, py::arg("count") = 1)
      .def("injected_reads", &PyEngine::injected_reads)
      .def("close", &PyEngine::close, py::arg("seconds"), py::call_guard<py::gil_scoped_release>())
      .def("before_fork", &PyEngine::before_fork)
      .def("after_fork", &PyEngine::after_fork);
  bind_entry_cache(module);
  module.def("probe_uring", &probe_uring);
  module.def("probe_process_madvise", &probe_process_madvise);
}

}  // namespace tierstore
