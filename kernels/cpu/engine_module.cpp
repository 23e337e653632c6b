// The Python face of the lookup path: checks arguments, holds what must outlive a job, and releases the interpreter
// lock.
#include "engine_module.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "buffers_module.h"
#include "engine.h"
#include "table_module.h"

namespace py = pybind11;

namespace tierstore {
namespace {

using Clock = std::chrono::steady_clock;

// Copies of so few entries are over sooner than the interpreter lock is given back and taken again: with 64 threads
// that look up one token each, doing so made every lookup five times dearer. Whatever reads from disk releases it.
constexpr size_t kBriefPairs = 16;

// A batch is gathered in pieces, so that Python can handle signals between two of them: so much output each, or so many
// pairs.
constexpr size_t kPieceBytes = 8 << 20;
constexpr size_t kPiecePairs = 1 << 16, kPiecePairsMax = 1 << 20;
constexpr std::chrono::milliseconds kSlice{kSliceMs};

void check_signals() {
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

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
         py::detail::check_flags(object.ptr(), py::array::c_style | py::detail::npy_api::NPY_ARRAY_ALIGNED_) &&
         (!writeable || array.writeable());
}

bool overlap(const void* a, size_t a_bytes, const void* b, size_t b_bytes) {
  const auto a_start = reinterpret_cast<uintptr_t>(a), b_start = reinterpret_cast<uintptr_t>(b);
  return a_start < b_start + b_bytes && b_start < a_start + a_bytes;
}

// A job submitted from Python. Dropped, it cancels a job that is not done, unless that was detached: nobody else would
// see to it that the job's output is left alone meanwhile.
class Ticket {
 public:
  explicit Ticket(std::shared_ptr<Job> job) : job_(std::move(job)) {}
  ~Ticket() {
    if (!detached_) cancel();
  }
  Ticket(const Ticket&) = delete;
  Ticket& operator=(const Ticket&) = delete;

  bool done() {
    drop_released();
    return job_->is_done();
  }

  // Nothing is written to the job's output after this.
  void cancel() {
    job_->cancel();
    drop_released();
  }

  // Lets the job go on when the ticket is dropped.
  void detach() { detached_ = true; }

  // Returns False if the time ran out, else the fault or None.
  py::object wait(double seconds) {
    const std::shared_ptr<Job> job = job_;
    const auto deadline = Clock::now() + std::chrono::duration<double>(std::min(seconds, 1e9));
    for (;;) {
      const std::chrono::duration<double> left = deadline - Clock::now();
      bool done = job->is_done();
      if (!done) {
        py::gil_scoped_release released;
        done = job->wait(std::max(0.0, std::min(left.count(), kSliceMs / 1000.0)));
      }
      drop_released();
      if (done) return fault_tuple(job->fault);
      if (left.count() <= 0) return py::bool_(false);
      check_signals();
    }
  }

 private:
  std::shared_ptr<Job> job_;
  bool detached_ = false;
};

class PyEngine {
 public:
  PyEngine(const std::vector<py::dict>& records, const std::string& mode, bool use_process_madvise, size_t num_readers,
           size_t depth, size_t assembly_bytes, size_t pread_threads, size_t jobs_max, double wait_s,
           const py::object& shared) {
    num_readers_ = num_readers;
    mode_ = mode_of(mode);
    require(num_readers >= 1 && depth >= 1 && depth <= 4096 && pread_threads >= 1 && jobs_max >= 1,
            "limits are at least 1");
    EngineShape shape{mode_of(mode), use_process_madvise,       num_readers, pread_threads, jobs_max,
                      wait_s,        {depth, 0, assembly_bytes}};
    std::vector<Table> tables;
    for (const py::dict& record : records) {
      tables.push_back(make_table(record, shape.mode));
      Table& table = tables.back();
      shape.reader.page_bytes = std::max(shape.reader.page_bytes, (table.page_bytes + 4095) / 4096 * 4096);
      require(table.entry_bytes() <= assembly_bytes, "the assembly buffer holds an entry");
      if (py::isinstance<HeldCache>(record["memory"])) {
        const auto& held = record["memory"].cast<const HeldCache&>();
        require(held.cache->entry_bytes() == table.entry_bytes(), "the cache is one of such entries");
        table.cache = held.cache;
        memory_.push_back(held.memory);
      } else {
        memory_.push_back(record["memory"].cast<py::array_t<uint8_t, py::array::c_style>>());
        require(static_cast<uint64_t>(memory_.back().nbytes()) >= table.num_rows * table.row_bytes,
                "memory holds the resident rows");
      }
      if (!record["statics"].is_none()) {
        require(table.cache != nullptr, "a resident table needs no static set");
        table.statics = make_statics(record["statics"].cast<py::dict>(), table, shape.mode, held_);
        shape.reader.page_bytes = std::max(shape.reader.page_bytes, table.statics.placed.read_bytes_max());
      }
    }
    if (!shared.is_none()) join(shared.cast<py::tuple>(), shape);
    engine_ = std::make_unique<Engine>(std::move(tables), shape);
  }

  ~PyEngine() {
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

  // None: done. False: the arguments, or the state, need Python's look; `out` is undefined then. A tuple: a fault.
  py::object lookup(size_t index, py::handle keys, py::handle out) {
    if (!fits(index, keys, out)) return py::bool_(false);
    return timed([&] { return read(part_of(index, keys, py::none(), out)); });
  }

  // [(table, keys, out), ...], checked. Returns a Ticket, whose job had hold of every out before a read began; None if
  // nothing was missing, or False as `lookup` does. After an exception nothing is written.
  py::object submit(const std::vector<std::tuple<size_t, py::object, py::object>>& requests) {
    for (const auto& [index, keys, out] : requests) {
      if (!fits(index, keys, out)) return py::bool_(false);
    }
    std::vector<Part> parts;
    parts.reserve(requests.size());
    for (const auto& [index, keys, out] : requests) parts.push_back(part_of(index, keys, py::none(), out));
    return start(parts);
  }

  // keys, int64 [M], and their pairs, int32 [M], of one table into out, uint8 [M, entry_bytes]. Returns as `submit`
  // does.
  py::object submit_pairs(size_t index, py::handle keys, py::handle pairs, py::handle out) {
    if (index >= engine_->tables().size() || !is_array(keys, 'i', 8, false) || !is_array(pairs, 'i', 4, false) ||
        !is_array(out, 'u', 1, true)) {
      return py::bool_(false);
    }
    const Table& table = engine_->tables()[index];
    const auto k = py::reinterpret_borrow<py::array>(keys), p = py::reinterpret_borrow<py::array>(pairs);
    auto o = py::reinterpret_borrow<py::array>(out);
    if (k.ndim() != 1 || p.ndim() != 1 || p.size() != k.size() || k.size() > std::numeric_limits<uint32_t>::max() ||
        o.ndim() != 2 || o.shape(0) != k.size() || o.shape(1) != static_cast<py::ssize_t>(table.entry_bytes()) ||
        (table.cache == nullptr && table.resident == nullptr)) {
      return py::bool_(false);
    }
    std::vector<Part> parts;
    parts.push_back(part_of(index, keys, pairs, out));
    return start(parts);
  }

  // Row ids, int64 [R], -1 for a zero row, into uint8 [R, row_bytes], past the cache. Returns as `lookup` does. Those
  // of whole tokens of a resident table, [N, O * H], are counted as keys.
  py::object rows(size_t index, py::handle row_ids, py::handle out) {
    const Table& table = engine_->tables().at(index);
    return read_units(index, row_ids, out, table.row_bytes, kRowUnit);
  }

  // Pages, int64 [P], all different, into uint8 [P, page_bytes]. Returns as `lookup` does.
  py::object read_pages(size_t index, py::handle page_numbers, py::handle out) {
    const Table& table = engine_->tables().at(index);
    return read_units(index, page_numbers, out, table.page_bytes, kPageUnit);
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
    if (index >= engine_->tables().size() || !is_array(keys, 'i', 8, false) || !is_array(sources, 'u', 1, true))
      return py::bool_(false);
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
    if (engine_->num_readers() < num_readers_) found.emplace_back("readers", engine_->num_readers(), num_readers_);
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

  // (how many page readers there are, how many of them are free)
  std::pair<size_t, size_t> page_readers() const { return {engine_->num_readers(), engine_->num_free_readers()}; }

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
  // One table's part of a lookup. `own_keys`: a copy of keys that lie where output goes.
  struct Part {
    size_t index;
    PairList list;
    uint8_t* out;
    py::object out_object;
    size_t out_bytes;
    uint8_t unit = 0;  // of `gather_units`, else 0
    bool of_tokens = false;
    std::vector<int64_t> own_keys;
    std::vector<int32_t> own_pairs;

    void keep_keys_from(const uint8_t* out, size_t out_bytes) {
      if (own_keys.empty() && overlap(list.keys, list.count * sizeof(int64_t), out, out_bytes)) {
        own_keys.assign(list.keys, list.keys + list.count);
        list.keys = own_keys.data();
      }
      if (own_pairs.empty() && list.pairs != nullptr &&
          overlap(list.pairs, list.count * sizeof(int32_t), out, out_bytes)) {
        own_pairs.assign(list.pairs, list.pairs + list.count);
        list.pairs = own_pairs.data();
      }
    }
  };

  // Of arrays that fit.
  static Part part_of(size_t index, py::handle keys, py::handle pairs, py::handle out) {
    const auto key_array = py::reinterpret_borrow<py::array>(keys);
    auto out_array = py::reinterpret_borrow<py::array>(out);
    Part part{index,
              {static_cast<const int64_t*>(key_array.data()), static_cast<size_t>(key_array.size())},
              static_cast<uint8_t*>(out_array.mutable_data()),
              out_array,
              static_cast<size_t>(out_array.nbytes()),
              0,
              false,
              {},
              {}};
    if (!pairs.is_none())
      part.list.pairs = static_cast<const int32_t*>(py::reinterpret_borrow<py::array>(pairs).data());
    part.keep_keys_from(part.out, part.out_bytes);
    return part;
  }

  // Copies what memory holds of a part. False: the engine is closed, or a key is none of the table's. The interpreter's
  // lock is as `released` says; between two pieces nothing of the engine is in use, and Python may handle signals.
  bool gather(const Part& part, Gathered& gathered, std::optional<py::gil_scoped_release>& released) {
    const Table& table = engine_->tables()[part.index];
    const size_t entry_bytes = part.unit == 0 ? table.entry_bytes() : table.row_bytes;
    const size_t whole = part.unit == 0 && part.list.pairs == nullptr ? table.num_orders : 1;
    const size_t piece = std::clamp(kPieceBytes / entry_bytes, kPiecePairs, kPiecePairsMax) / whole * whole;
    std::optional<Clock::time_point> looked;  // never if one piece is all
    for (size_t start = 0;;) {
      PairList list = part.list;
      list.first = start;
      list.count = std::min(piece, list.count - start);
      list.keys += start;
      if (list.pairs != nullptr) list.pairs += start;
      {
        const Engine::Use use(*engine_);
        if (!use) return false;
        if (!(part.unit == 0
                  ? engine_->gather(use.view(), part.index, list, part.out, gathered)
                  : engine_->gather_units(part.index, list, part.out, part.unit, part.of_tokens, gathered))) {
          return false;
        }
      }
      start += list.count;
      if (start >= part.list.count) return true;
      const auto now = Clock::now();
      if (!looked) looked = now;
      if (now - *looked < kSlice) continue;
      looked = now;
      released.reset();
      check_signals();
      released.emplace();
    }
  }

  template <typename Act>
  py::object timed(const Act& act) {
    const auto started = Latency::begin();
    py::object outcome = act();
    if (!py::isinstance<py::bool_>(outcome)) engine_->latency.end(started);
    return outcome;
  }

  // Looks a part up on this thread, to the end. Returns as `lookup` does.
  py::object read(const Part& part) {
    Gathered gathered;
    bool good;
    {
      std::optional<py::gil_scoped_release> released;
      if (part.list.count > kBriefPairs || part.unit != 0) released.emplace();
      good = gather(part, gathered, released);
      if (good && part.unit != kPageUnit) engine_->count_batch(gathered);
    }
    if (!good) return py::bool_(false);
    if (gathered.misses.empty() || gathered.fault.kind != FaultKind::kNone) return fault_tuple(gathered.fault);
    const std::shared_ptr<Job> job = engine_->make_job(std::move(gathered), {{part.index, part.out}});
    const Carried carried = carry(job, {part.out_object});
    if (carried == Carried::kClosed) return py::bool_(false);
    return fault_tuple(carried == Carried::kDone ? job->fault : wait_for(*job));
  }

  enum class Carried { kDone, kHandedOn, kClosed };

  // Carries a job on this thread, or has a worker do so once it takes longer than a slice; so nothing of the engine is
  // in use while Python handles signals, unless there is no worker to be had. objects: what it writes to; none if it
  // holds that already. If this throws, no worker has the job, and nothing is written.
  Carried carry(const std::shared_ptr<Job>& job, const std::vector<py::object>& objects) {
    using State = Engine::Carrier::State;
    const py::gil_scoped_release released;
    const Engine::Use use(*engine_);
    if (!use) return Carried::kClosed;
    Engine::Carrier carrier(*engine_, job);
    bool held = objects.empty();
    if (held) carrier.let_hand_on();
    for (;;) {
      const State state = carrier.run();
      if (state != State::kUnderWay) return state == State::kDone ? Carried::kDone : Carried::kHandedOn;
      const py::gil_scoped_acquire acquired;
      if (held) {
        check_signals();
      } else {
        job->hold(hold_objects(objects));
        held = true;
        carrier.let_hand_on();
      }
    }
  }

  // Waits for a job that a worker has; returns its fault. Python handles signals meanwhile; what they raise ends the
  // job.
  Fault wait_for(Job& job) {
    const auto started = Clock::now();
    try {
      for (;;) {
        bool done;
        {
          const py::gil_scoped_release released;
          done = job.wait(kSliceMs / 1000.0);
        }
        if (done) break;
        check_signals();
        if (!job.begun() &&
            Clock::now() - started > std::chrono::duration<double>(engine_->wait_s())) {  // every page reader is stuck
          job.cancel();
          return {FaultKind::kTimeout, 0, 0, static_cast<int>(engine_->wait_s())};
        }
      }
    } catch (...) {
      job.cancel();
      throw;
    }
    drop_released();
    return job.fault;
  }

  // Gathers, and submits what is missing. Returns as `submit` does.
  py::object start(std::vector<Part>& parts) {
    std::vector<py::object> objects;
    std::vector<std::pair<size_t, uint8_t*>> outputs;
    for (Part& part : parts) {
      objects.push_back(part.out_object);
      outputs.emplace_back(part.index, part.out);
      for (const Part& other : parts) part.keep_keys_from(other.out, other.out_bytes);
    }
    const auto started = Latency::begin();
    Gathered gathered;
    bool good = true;
    {
      std::optional<py::gil_scoped_release> released;
      released.emplace();
      for (size_t i = 0; good && i < parts.size(); ++i) good = gather(parts[i], gathered, released);
    }
    drop_released();
    if (!good || (parts.empty() && !Engine::Use(*engine_))) return py::bool_(false);
    engine_->count_batch(gathered);
    if (gathered.misses.empty()) engine_->latency.end(started);
    if (gathered.misses.empty() && gathered.fault.kind == FaultKind::kNone) return py::none();
    const std::shared_ptr<Job> job = engine_->make_job(std::move(gathered), outputs);
    if (!job->misses.empty()) job->started = started;
    job->hold(hold_objects(std::move(objects)));
    py::object ticket = py::cast(std::make_unique<Ticket>(job));  // before it starts: whoever drops this cancels it
    try {
      if (start_job(job)) return ticket;
    } catch (...) {
      end(*job, {FaultKind::kCancelled, 0, 0, 0});
      throw;
    }
    end(*job, {FaultKind::kCancelled, 0, 0, 0});
    return py::bool_(false);
  }

  // Has a worker take a job, or ends it. False: the engine is closed. If this throws, no worker has it.
  bool start_job(const std::shared_ptr<Job>& job) {
    const auto started = Clock::now();
    while (job->fault.kind == FaultKind::kNone) {
      Engine::Submitted submitted;
      {
        const py::gil_scoped_release released;
        {
          const Engine::Use use(*engine_);
          if (!use) return false;
          submitted = engine_->submit(job);
        }
        if (submitted == Engine::Submitted::kNoRoom) engine_->wait_for_room();
      }
      if (submitted == Engine::Submitted::kUnderWay) return true;
      if (submitted == Engine::Submitted::kNoWorker) {
        const Carried carried = carry(job, {});
        if (carried == Carried::kHandedOn) return true;
        if (carried == Carried::kClosed) return false;
        break;
      }
      check_signals();
      if (Clock::now() - started > std::chrono::duration<double>(engine_->wait_s())) {
        job->fault = {FaultKind::kTimeout, 0, 0, static_cast<int>(engine_->wait_s())};
      }
    }
    engine_->latency.end(job->started);
    end(*job, job->fault);
    return true;
  }

  // Ends a job that no worker has.
  static void end(Job& job, const Fault& fault) {
    job.fault = fault;
    job.finish();
    drop_released();
  }

  // Attaches the engine to a daemon's epochs: (control block, number of the version, the client's own block, whether to
  // report there).
  void join(const py::tuple& shared, EngineShape& shape) {
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

  // Says whether keys are int64 [N, O] and out uint8 [N, O * H, row_bytes], contiguous.
  bool fits(size_t index, py::handle keys, py::handle out) const {
    if (index >= engine_->tables().size() || !is_array(keys, 'i', 8, false) || !is_array(out, 'u', 1, true))
      return false;
    const Table& table = engine_->tables()[index];
    if (table.cache == nullptr && table.resident == nullptr) return false;
    const auto k = py::reinterpret_borrow<py::array>(keys);
    const auto o = py::reinterpret_borrow<py::array>(out);
    return k.ndim() == 2 && o.ndim() == 3 && k.shape(1) == static_cast<py::ssize_t>(table.num_orders) &&
           k.size() <= std::numeric_limits<uint32_t>::max() && o.shape(0) == k.shape(0) &&
           o.shape(1) == static_cast<py::ssize_t>(table.num_heads()) &&
           o.shape(2) == static_cast<py::ssize_t>(table.row_bytes);
  }

  py::object read_units(size_t index, py::handle ids, py::handle out, size_t unit_bytes, uint8_t unit) {
    if (!is_array(ids, 'i', 8, false) || !is_array(out, 'u', 1, true)) return py::bool_(false);
    const auto count = static_cast<size_t>(py::reinterpret_borrow<py::array>(ids).size());
    if (static_cast<size_t>(py::reinterpret_borrow<py::array>(out).nbytes()) != count * unit_bytes ||
        count > std::numeric_limits<uint32_t>::max()) {
      return py::bool_(false);
    }
    Part part = part_of(index, ids, py::none(), out);
    part.unit = unit;
    const auto id_array = py::reinterpret_borrow<py::array>(ids);
    part.of_tokens =
        id_array.ndim() == 2 && id_array.shape(1) == static_cast<py::ssize_t>(engine_->tables()[index].num_heads());
    if (unit != kRowUnit) return read(part);
    return timed([&] { return read(part); });
  }

  std::unique_ptr<Engine> engine_;
  size_t num_readers_ = 0;
  ReadMode mode_ = ReadMode::kPread;
  std::vector<py::array> memory_;       // of each table, in their order
  std::vector<py::array> held_;         // what static sets lie in
  std::vector<py::array> gate_memory_;  // what epochs are seen and counted in, also by lookups that come after `close`
};

}  // namespace

Engine& engine_of(py::handle object) {
  if (!py::isinstance<PyEngine>(object)) throw py::type_error("engine must be an Engine");
  return object.cast<PyEngine&>().engine();
}

py::object fault_tuple(const Fault& fault) {
  static const char* const kNames[] = {"none", "page", "disk", "timeout", "forked", "entry", "memory", "cancelled"};
  if (fault.kind == FaultKind::kNone) return py::none();
  return py::make_tuple(kNames[static_cast<int>(fault.kind)], fault.table, fault.page, fault.detail);
}

void bind_engine(py::module_& module) {
  py::class_<Ticket>(module, "Ticket", py::module_local())
      .def("done", &Ticket::done)
      .def("cancel", &Ticket::cancel)
      .def("detach", &Ticket::detach)
      .def("wait", &Ticket::wait, py::arg("seconds"));
  py::class_<PyEngine>(module, "Engine", py::module_local())
      .def(py::init<const std::vector<py::dict>&, const std::string&, bool, size_t, size_t, size_t, size_t, size_t,
                    double, const py::object&>(),
           py::arg("tables"), py::kw_only(), py::arg("mode"), py::arg("use_process_madvise"), py::arg("num_readers"),
           py::arg("depth"), py::arg("assembly_bytes"), py::arg("pread_threads"), py::arg("jobs_max"),
           py::arg("wait_s"), py::arg("shared") = py::none())
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
      .def("page_readers", &PyEngine::page_readers)
      .def("close", &PyEngine::close, py::arg("seconds"), py::call_guard<py::gil_scoped_release>())
      .def("before_fork", &PyEngine::before_fork)
      .def("after_fork", &PyEngine::after_fork);
  bind_entry_cache(module);
  module.def("probe_uring", &probe_uring);
  module.def("probe_process_madvise", &probe_process_madvise);
}

}  // namespace tierstore
