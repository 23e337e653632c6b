// Lookups of the Python engine, from checked arrays to rows or a Ticket.
#include <pybind11/stl.h>

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <utility>

#include "buffers_module.h"
#include "py_engine.h"
#include "row_gather.h"
#include "ticket_module.h"

namespace py = pybind11;

namespace tierstore {
namespace {

// Copies of so few entries are over sooner than the interpreter lock is given back and taken again: with 64 threads
// that look up one token each, doing so made every lookup five times dearer. Whatever reads from disk releases it.
constexpr size_t kBriefPairs = 16;

// A batch is gathered in pieces, so that Python can handle signals between two of them: so much output each, or so many
// pairs.
constexpr size_t kPieceBytes = 8 << 20;
constexpr size_t kPiecePairs = 1 << 16, kPiecePairsMax = 1 << 20;
constexpr std::chrono::milliseconds kSlice{kSliceMs};

constexpr const char* kLookupWanted =
    "keys must be int64 [N, O], out uint8 [N, O * H, row_bytes] and sources uint8 [N, O], all contiguous, of a table "
    "whose "
    "rows are there";
constexpr const char* kPairsWanted =
    "keys must be int64 [M], pairs int32 [M] and out uint8 [M, entry_bytes], all contiguous, of a table whose rows are "
    "there";
constexpr const char* kRowsWanted =
    "row_ids must be int64 [R] or [N, K], contiguous, and out uint8 of the same shape and [row_bytes], of a table "
    "whose "
    "rows are there";
constexpr const char* kLocateWanted =
    "keys must be int64 [N, O] and sources uint8 [N, O], both contiguous, of a table whose rows are there";
constexpr const char* kOutsideTable = "a key, a row id or a pair is not one of the table's";

void check_signals() {
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

std::chrono::steady_clock::time_point after(const std::optional<double>& seconds) {
  using Clock = std::chrono::steady_clock;
  if (!seconds) return Clock::time_point::max();
  const std::chrono::duration<double> limit(std::clamp(*seconds, 0.0, 1e9));
  return Clock::now() + std::chrono::duration_cast<Clock::duration>(limit);
}

RowRange row_range(const PyRowRange& wanted) {
  return wanted ? RowRange{std::max(wanted->first, int64_t{0}), wanted->second} : RowRange{};
}

}  // namespace

// Raises what a lookup must raise. kOverdue is the caller's own limit, and not a fault.
void PyEngine::check(const Fault& fault) const {
  if (fault.kind == FaultKind::kOutside) throw std::invalid_argument(kOutsideTable);
  if (fault.kind != FaultKind::kOverdue) fault_names_.check(fault);
}

// Raises why arrays were not taken: a closed engine has no rows any more, so whether it is closed comes first.
void PyEngine::refuse(const char* wanted) const {
  if (engine_->is_closed()) fault_names_.raise({FaultKind::kClosed, 0, 0, 0});
  throw std::invalid_argument(wanted);
}

bool PyEngine::try_lookup(size_t index, py::handle keys, py::handle out) {
  TableRequest request;
  if (!request.fill_lookup(engine_->tables(), index, keys, out, py::handle())) return false;
  const auto started = Latency::begin();
  const Fault fault = read(request, Clock::time_point::max());
  if (fault.kind == FaultKind::kClosed || fault.kind == FaultKind::kOutside) return false;
  engine_->latency.end(started);
  fault_names_.check(fault);
  return true;
}

bool PyEngine::lookup(size_t index, py::handle keys, py::handle out, py::handle sources,
                      const std::optional<double>& seconds) {
  TableRequest request;
  if (!request.fill_lookup(engine_->tables(), index, keys, out, sources.is_none() ? py::handle() : sources))
    refuse(kLookupWanted);
  const auto started = Latency::begin();
  const Fault fault = read(request, after(seconds));
  check(fault);
  engine_->latency.end(started);
  return fault.kind != FaultKind::kOverdue;
}

bool PyEngine::rows(size_t index, py::handle row_ids, py::handle out, const PyRowRange& wanted,
                    const std::optional<double>& seconds) {
  TableRequest request;
  if (!request.fill_rows(engine_->tables(), index, row_ids, out, row_range(wanted))) refuse(kRowsWanted);
  const auto started = Latency::begin();
  const Fault fault = read(request, after(seconds));
  check(fault);
  engine_->latency.end(started);
  return fault.kind != FaultKind::kOverdue;
}

py::object PyEngine::submit_rows(size_t index, py::handle row_ids, py::handle out, const PyRowRange& wanted) {
  std::vector<TableRequest> requests(1);
  if (!requests[0].fill_rows(engine_->tables(), index, row_ids, out, row_range(wanted))) refuse(kRowsWanted);
  return start(requests);
}

void PyEngine::locate(size_t index, py::handle keys, py::handle sources) {
  TableRequest request;
  if (!request.fill_locate(engine_->tables(), index, keys, sources)) refuse(kLocateWanted);
  const size_t num_tokens = request.list.count / engine_->tables()[index].num_orders;
  bool open;
  {
    const py::gil_scoped_release released;
    const Engine::Use use(*engine_);
    open = static_cast<bool>(use);
    if (open) engine_->locate(use.view(), index, request.list.keys, num_tokens, request.out.rows);
  }
  if (!open) check({FaultKind::kClosed, 0, 0, 0});
}

py::object PyEngine::submit(const std::vector<std::tuple<size_t, py::object, py::object>>& lookups) {
  std::vector<TableRequest> requests;
  requests.reserve(lookups.size());
  for (const auto& [index, keys, out] : lookups) {
    if (!requests.emplace_back().fill_lookup(engine_->tables(), index, keys, out, py::handle())) refuse(kLookupWanted);
  }
  return start(requests);
}

py::object PyEngine::submit_pairs(size_t index, py::handle keys, py::handle pairs, py::handle out) {
  std::vector<TableRequest> requests(1);
  if (!requests[0].fill_pairs(engine_->tables(), index, keys, pairs, out)) refuse(kPairsWanted);
  return start(requests);
}

// Copies what memory holds of a request. kClosed, kOutside: `out` is undefined. The interpreter's lock is as
// `released` has it; between two pieces nothing of the engine is in use, and Python may handle signals.
FaultKind PyEngine::gather(const TableRequest& request, Gathered& gathered,
                           std::optional<py::gil_scoped_release>& released) {
  if (request.by_row_id) return gather_by_row_id(request, gathered, released);
  const Table& table = engine_->tables()[request.index];
  const size_t whole = request.list.pairs != nullptr ? 1 : table.num_orders;
  const size_t piece = std::clamp(kPieceBytes / table.entry_bytes(), kPiecePairs, kPiecePairsMax) / whole * whole;
  std::optional<Clock::time_point> looked;  // never if one piece is all
  for (size_t start = 0;;) {
    const PairList list = request.list.part(start, piece);
    {
      const Engine::Use use(*engine_);
      if (!use) return FaultKind::kClosed;
      if (!engine_->gather(use.view(), request.index, list, request.out, gathered)) return FaultKind::kOutside;
    }
    start += list.count;
    if (start >= request.list.count) return FaultKind::kNone;
    handle_signals(looked, released);
  }
}

FaultKind PyEngine::gather_by_row_id(const TableRequest& request, Gathered& gathered,
                                     std::optional<py::gil_scoped_release>& released) {
  RowGather rows(*engine_, request.index, request.rows_out, request.of_tokens);
  std::optional<Clock::time_point> looked;
  for (size_t start = 0;;) {
    const size_t count = std::min(rows.rows_max(), request.list.count - start);
    {
      const Engine::Use use(*engine_);
      if (!use) return FaultKind::kClosed;
      if (!rows.gather(use.view(), request.list.keys + start, start, count, gathered)) return FaultKind::kOutside;
    }
    start += count;
    if (start >= request.list.count) return FaultKind::kNone;
    handle_signals(looked, released);
  }
}

// Lets Python handle signals, once a slice. Nothing of the engine is in use.
void PyEngine::handle_signals(std::optional<Clock::time_point>& looked,
                              std::optional<py::gil_scoped_release>& released) const {
  const auto now = Clock::now();
  if (!looked) looked = now;
  if (now - *looked < kSlice) return;
  looked = now;
  const bool was_released = released.has_value();
  released.reset();
  check_signals();
  if (was_released) released.emplace();
}

// Looks a request up on this thread, to the end. Returns how it ended, also kClosed, kOutside or kOverdue.
Fault PyEngine::read(const TableRequest& request, Clock::time_point until) {
  Gathered gathered;
  FaultKind kind;
  {
    std::optional<py::gil_scoped_release> released;
    const size_t rows_per_pair = request.of_tokens ? engine_->tables()[request.index].rows_per_key : 1;
    if (request.list.count / rows_per_pair > kBriefPairs) released.emplace();
    kind = gather(request, gathered, released);
    if (kind == FaultKind::kNone) engine_->count_batch(gathered);
  }
  if (kind != FaultKind::kNone) return {kind, 0, 0, 0};
  if (gathered.misses.empty() || gathered.fault.kind != FaultKind::kNone) return gathered.fault;
  const std::shared_ptr<Job> job = engine_->make_job(std::move(gathered), {{request.index, request.target()}});
  switch (carry(job, {request.out_object}, until)) {
    case Carried::kDone:
      return job->fault;
    case Carried::kHandedOn:
      return wait_for(*job, until);
    case Carried::kClosed:
      return {FaultKind::kClosed, 0, 0, 0};
    case Carried::kOverdue:
      return {FaultKind::kOverdue, 0, 0, 0};
  }
  return {};
}

// Carries a job on this thread, or has a worker do so once it takes longer than a slice; so nothing of the engine is in
// use while Python handles signals, unless there is no worker to be had. objects: what it writes to; none if it owns
// that already. If this throws, or the time is over, no worker has the job, and nothing is written.
PyEngine::Carried PyEngine::carry(const std::shared_ptr<Job>& job, const std::vector<py::object>& objects,
                                  Clock::time_point until) {
  using State = Engine::Carrier::State;
  const py::gil_scoped_release released;
  const Engine::Use use(*engine_);
  if (!use) return Carried::kClosed;
  Engine::Carrier carrier(*engine_, job);
  bool owns_objects = objects.empty();
  if (owns_objects) carrier.let_hand_on();
  for (;;) {
    const State state = carrier.run();
    if (state != State::kUnderWay) return state == State::kDone ? Carried::kDone : Carried::kHandedOn;
    if (Clock::now() >= until) return Carried::kOverdue;
    const py::gil_scoped_acquire acquired;
    if (owns_objects) {
      check_signals();
    } else {
      job->hold(hold_objects(objects));  // before a worker may have it
      owns_objects = true;
      carrier.let_hand_on();
    }
  }
}

// Waits for a job that a worker has; returns how it ended. Python handles signals meanwhile; what they raise ends the
// job, as the end of the time does: nothing is written then.
Fault PyEngine::wait_for(Job& job, Clock::time_point until) {
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
      const auto now = Clock::now();
      if (now >= until) {
        job.cancel();
        return {FaultKind::kOverdue, 0, 0, 0};
      }
      if (!job.begun() &&
          now - started > std::chrono::duration<double>(engine_->wait_s())) {  // every page reader is stuck
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
py::object PyEngine::start(std::vector<TableRequest>& requests) {
  std::vector<py::object> objects;
  std::vector<std::pair<size_t, RowsOut>> outputs;
  for (TableRequest& request : requests) {
    objects.push_back(request.out_object);
    outputs.emplace_back(request.index, request.target());
    for (const TableRequest& other : requests) request.keep_keys_from(other.out.rows, other.out_bytes);
  }
  const auto started = Latency::begin();
  Gathered gathered;
  FaultKind kind = FaultKind::kNone;
  {
    std::optional<py::gil_scoped_release> released;
    released.emplace();
    for (size_t i = 0; kind == FaultKind::kNone && i < requests.size(); ++i)
      kind = gather(requests[i], gathered, released);
  }
  drop_released();
  if (requests.empty() && !Engine::Use(*engine_)) kind = FaultKind::kClosed;
  check({kind, 0, 0, 0});
  engine_->count_batch(gathered);
  if (gathered.misses.empty()) engine_->latency.end(started);
  if (gathered.misses.empty() && gathered.fault.kind == FaultKind::kNone) return py::none();
  const std::shared_ptr<Job> job = engine_->make_job(std::move(gathered), outputs);
  if (!job->misses.empty()) job->started = started;
  job->hold(hold_objects(std::move(objects)));
  py::object ticket = py::cast(std::make_unique<Ticket>(job, fault_names_));  // before it starts: a lost one cancels it
  try {
    kind = start_job(job);
  } catch (...) {
    end(*job, {FaultKind::kCancelled, 0, 0, 0});
    throw;
  }
  if (kind == FaultKind::kNone) return ticket;
  end(*job, {FaultKind::kCancelled, 0, 0, 0});
  fault_names_.raise({kind, 0, 0, 0});
}

// Has a worker take a job, or ends it. kClosed: the engine is closed. Then, or if this throws, no worker has it.
FaultKind PyEngine::start_job(const std::shared_ptr<Job>& job) {
  const auto started = Clock::now();
  while (job->fault.kind == FaultKind::kNone) {
    Engine::Submitted submitted;
    {
      const py::gil_scoped_release released;
      {
        const Engine::Use use(*engine_);
        if (!use) return FaultKind::kClosed;
        submitted = engine_->submit(job);
      }
      if (submitted == Engine::Submitted::kNoRoom) engine_->wait_for_room();
    }
    if (submitted == Engine::Submitted::kUnderWay) return FaultKind::kNone;
    if (submitted == Engine::Submitted::kNoWorker) {
      const Carried carried = carry(job, {}, Clock::time_point::max());
      if (carried == Carried::kHandedOn) return FaultKind::kNone;
      if (carried == Carried::kClosed) return FaultKind::kClosed;
      break;
    }
    check_signals();
    if (Clock::now() - started > std::chrono::duration<double>(engine_->wait_s())) {
      job->fault = {FaultKind::kTimeout, 0, 0, static_cast<int>(engine_->wait_s())};
    }
  }
  engine_->latency.end(job->started);
  end(*job, job->fault);
  return FaultKind::kNone;
}

// Ends a job that no worker has.
void PyEngine::end(Job& job, const Fault& fault) {
  job.fault = fault;
  job.finish();
  drop_released();
}

}  // namespace tierstore
