// The lookup path as Python sees it: checks arguments, keeps what must outlive a job, releases the interpreter lock,
// and raises faults.
//
// engine_module.cpp has its lifetime and what it reports of itself, lookup_module.cpp the lookups.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "engine.h"
#include "fault_names.h"
#include "request_module.h"
#include "table_module.h"

namespace tierstore {

using PyRowRange = std::optional<std::pair<int64_t, int64_t>>;

class PyEngine {
 public:
  PyEngine(const std::vector<TableRecord>& records, const std::string& mode, bool use_process_madvise,
           size_t num_readers, size_t num_threads, size_t part_bytes, size_t depth, size_t assembly_bytes,
           size_t pread_threads, size_t jobs_max, double wait_s, const pybind11::object& shared,
           pybind11::object make_fault, const std::pair<std::string, double>& served_by);
  ~PyEngine();
  PyEngine(const PyEngine&) = delete;
  PyEngine& operator=(const PyEngine&) = delete;

  // Lookups. All raise: what make_fault returns for a fault or a closed engine, ValueError for arrays that are not as
  // request_module.h states. After an exception nothing is written to any array.

  // Looks up, or returns false with `out` undefined: the arrays are not of the plain form, or the engine is closed.
  bool try_lookup(size_t index, pybind11::handle keys, pybind11::handle out);
  // Looks up keys, and writes what answered each to sources, unless that is None. Returns false if `seconds`, unless
  // None, ran out before the rows were there.
  bool lookup(size_t index, pybind11::handle keys, pybind11::handle out, pybind11::handle sources,
              const std::optional<double>& seconds);
  // [(table, keys, out), ...]. Returns a Ticket, whose job owned every out before a read began; None if memory held
  // all.
  pybind11::object submit(const std::vector<std::tuple<size_t, pybind11::object, pybind11::object>>& lookups);
  // As `submit`, of single pairs.
  pybind11::object submit_pairs(size_t index, pybind11::handle keys, pybind11::handle pairs, pybind11::handle out);
  // Looks up rows by their ids (row_gather.h), -1 for a zero row. wanted: (start, end), ids outside of which give zero
  // rows too; None: all are wanted. Returns as `lookup` does.
  bool rows(size_t index, pybind11::handle row_ids, pybind11::handle out, const PyRowRange& wanted,
            const std::optional<double>& seconds);
  // The same, started. Returns as `submit` does.
  pybind11::object submit_rows(size_t index, pybind11::handle row_ids, pybind11::handle out, const PyRowRange& wanted);
  // Writes what would answer keys. Counts nothing.
  void locate(size_t index, pybind11::handle keys, pybind11::handle sources);

  // Declares that a resident table's memory holds its rows now, but for those of some pages. Comes before its first
  // lookup.
  void set_resident(size_t index, const std::vector<uint64_t>& bad_pages);

  // {"batches": ..., "tables": [(hits by order, hits in the static set by order, misses by order), ...]}
  pybind11::dict counters() const;
  // What the system did not give, so that the engine does with less: [(what, how many there are, how many were wanted),
  // ...]
  std::vector<std::tuple<std::string, size_t, size_t>> shortfalls() const;
  // (how many page readers there are, how many of them are free)
  std::pair<size_t, size_t> page_readers() const { return {engine_->num_readers(), engine_->num_free_readers()}; }

  // How many page readers have files and memory registered with the kernel; all of those that have no use for it.
  size_t registered_readers() const { return engine_->num_registered_readers(); }

  // Faults on purpose, for tests: see faults.h.
  void inject(const std::string& what, uint64_t first, uint64_t count);
  uint64_t injected_reads() const { return engine_->faults.seen(); }

  // Waits, without the interpreter lock; returns whether all lookups ended in time. Files may be closed, and buffers
  // dropped, only then.
  bool close(double seconds);

  void before_fork() { engine_->before_fork(); }
  void after_fork(bool in_child) { engine_->after_fork(in_child); }

  Engine& engine() { return *engine_; }
  const FaultNames& fault_names() const { return fault_names_; }

 private:
  using Clock = std::chrono::steady_clock;
  enum class Carried { kDone, kHandedOn, kClosed, kOverdue };

  // Attaches the engine to a daemon's epochs: (control block, number of the version, the client's own block, whether to
  // report there).
  void join(const pybind11::tuple& shared, EngineShape& shape);

  FaultKind gather(const TableRequest& request, Gathered& gathered,
                   std::optional<pybind11::gil_scoped_release>& released);
  FaultKind gather_by_row_id(const TableRequest& request, Gathered& gathered,
                             std::optional<pybind11::gil_scoped_release>& released);
  void handle_signals(std::optional<Clock::time_point>& looked,
                      std::optional<pybind11::gil_scoped_release>& released) const;
  Fault read(const TableRequest& request, Clock::time_point until);
  Carried carry(const std::shared_ptr<Job>& job, const std::vector<pybind11::object>& objects, Clock::time_point until);
  Fault wait_for(Job& job, Clock::time_point until);
  pybind11::object start(std::vector<TableRequest>& requests);
  FaultKind start_job(const std::shared_ptr<Job>& job);
  static void end(Job& job, const Fault& fault);
  void check(const Fault& fault) const;
  [[noreturn]] void refuse(const char* wanted) const;

  std::unique_ptr<Engine> engine_;
  const FaultNames fault_names_;
  size_t num_readers_ = 0;
  ReadMode mode_ = ReadMode::kPread;
  std::vector<pybind11::array> memory_;  // of each table, in their order
  std::vector<pybind11::array> held_;    // what static sets lie in
  std::vector<pybind11::array>
      gate_memory_;  // what epochs are seen and counted in, also by lookups that come after `close`
};

}  // namespace tierstore
