#include "engine.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <exception>
#include <mutex>
#include <new>
#include <optional>
#include <stdexcept>
#include <thread>
#include <utility>

#include "gather.h"
#include "line.h"

namespace tierstore {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::milliseconds kLookAgain{2};     // how often a closer looks whether all uses have ended
constexpr std::chrono::milliseconds kMakeAgain{1000};  // before a page reader is tried for again that could not be made
constexpr size_t kSortHere = 1 << 18;  // misses; more would take a caller too long, and a worker sorts them
constexpr auto kRelaxed = std::memory_order_relaxed;

Clock::duration seconds(double count) {
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(count));
}

}  // namespace

// Page readers, workers and who waits for them. Made anew in a forked child, where the parent's threads are not. It has
// room for all page readers and workers from the start, so that none is lost for want of memory.
struct Engine::Runtime {
  explicit Runtime(size_t num_readers) : lanes_max(num_readers) {
    readers.reserve(num_readers);
    free.reserve(num_readers);
    workers.reserve(num_readers);
  }

  bool reader_there() const { return !free.empty() || (readers.size() < lanes_max && Clock::now() >= make_again); }

  std::mutex mutex;  // guards all below
  std::condition_variable reader_freed, work_came, job_ended, use_ended;
  std::unique_ptr<PreadPool> pool;
  std::vector<std::unique_ptr<PageReader>> readers;
  std::vector<PageReader*> free;
  Line<PageReader> handed;  // with a job that was begun; or abandoned, to be drained
  Line<Job> pending;        // waiting for a page reader
  Ring<Job> under_way;      // all that a worker carries or will
  std::vector<std::thread> workers;
  const size_t lanes_max;
  Clock::time_point make_again{};
  bool stopping = false;  // somebody closes the engine,
  bool ended = false;     // and has: nothing of this is used any more
};

Engine::Engine(std::vector<Table> tables, const EngineShape& shape)
    : tables_(std::move(tables)),
      shape_(shape),
      runtime_(std::make_unique<Runtime>(shape.num_readers)),
      gate_(shape.epochs == nullptr
                ? std::make_unique<EpochGate>()
                : std::make_unique<EpochGate>(shape.epochs, shape.version,
                                              &ClientBlock::of(shape.client_block)->active[0].value,
                                              &ClientBlock::of(shape.client_block)->active[1].value)) {
  if (shape.reports) reports_ = std::make_unique<ReportWriter>(shape.client_block);
  for (const Table& table : tables_) table_counters.emplace_back(table.num_orders);
  while (runtime_->readers.size() < shape.num_readers && make_reader())
    continue;  // now, so that it is known whether they all are there
  if (runtime_->readers.empty()) throw std::runtime_error("no reader: out of memory, descriptors or locked memory");
}

Engine::~Engine() {
  if (!close(shape_.wait_s)) runtime_.release();
}

size_t Engine::num_readers() const {
  const std::lock_guard<std::mutex> lock(runtime_->mutex);
  return runtime_->readers.size();
}

size_t Engine::num_free_readers() const {
  const std::lock_guard<std::mutex> lock(runtime_->mutex);
  return runtime_->free.size();
}

bool Engine::gather(const EpochView& view, size_t index, const PairList& list, uint8_t* out, Gathered& gathered) {
  const Table& table = tables_[index];
  const size_t first_miss = gathered.misses.size();
  Found found;
  if (table.resident != nullptr) {
    int64_t bad_page = -1;
    found = gather_resident(table, list, out, bad_page);
    if (bad_page >= 0) gathered.fault = {FaultKind::kBadPage, static_cast<uint32_t>(index), bad_page, kPageBadChecksum};
  } else {
    std::optional<ReportSink> reports;
    if (reports_ != nullptr) reports.emplace(*reports_, static_cast<uint16_t>(index));
    bool holds = view.alive;
    if (holds) {
      found = gather_cached(table, view.epoch, static_cast<uint16_t>(index), list, out, gathered.misses,
                            reports ? &*reports : nullptr);
      holds = gate_->holds(view);
    }
    if (!holds) {
      gathered.misses.resize(first_miss);
      found = gather_nothing(table, static_cast<uint16_t>(index), list, out, gathered.misses);
    }
    table.cache->count_accesses(list.count);
  }
  if (!found.good) return false;
  uint64_t misses_of[kOrdersMax] = {}, sentinels = 0;
  for (size_t i = first_miss; i < gathered.misses.size(); ++i) ++misses_of[gathered.misses[i].order];
  TableCounters& counts = table_counters[index];
  for (size_t order = 0; order < table.num_orders; ++order) {
    counts.hits[order].fetch_add(found.pairs[order] - found.sentinels[order] - misses_of[order], kRelaxed);
    if (found.static_hits[order] > 0) counts.static_hits[order].fetch_add(found.static_hits[order], kRelaxed);
    if (misses_of[order] > 0) counts.misses[order].fetch_add(misses_of[order], kRelaxed);
    sentinels += found.sentinels[order];
  }
  if (sentinels > 0) counters.sentinels.fetch_add(sentinels, kRelaxed);
  return true;
}

bool Engine::gather_units(size_t index, const PairList& ids, uint8_t* out, uint8_t unit, bool of_tokens,
                          Gathered& gathered) {
  const Table& table = tables_[index];
  const size_t first_miss = gathered.misses.size();
  if (unit == kRowUnit && table.resident != nullptr) {
    int64_t bad_page = -1;
    if (!gather_resident_rows(table, ids, out, bad_page).good) return false;
    if (bad_page >= 0) gathered.fault = {FaultKind::kBadPage, static_cast<uint32_t>(index), bad_page, kPageBadChecksum};
  } else {
    const uint64_t num_units = unit == kRowUnit ? table.num_rows : table.num_pages;
    for (size_t i = 0; i < ids.count; ++i) {
      const int64_t id = ids.key(i);
      const size_t place = ids.first + i;
      if (id == -1 && unit == kRowUnit) {
        std::memset(out + place * table.row_bytes, 0, table.row_bytes);
      } else if (static_cast<uint64_t>(id) < num_units) {
        gathered.misses.push_back({id, static_cast<uint32_t>(place), static_cast<uint16_t>(index), unit, kNotPlaced});
      } else {
        return false;
      }
    }
  }
  if (unit == kRowUnit) {
    count_rows(index, ids, of_tokens && table.resident != nullptr);
    counters.rows_missed.fetch_add(gathered.misses.size() - first_miss, kRelaxed);
  }
  return true;
}

void Engine::locate(const EpochView& view, size_t index, const int64_t* keys, size_t num_tokens, uint8_t* sources) {
  const Table& table = tables_[index];
  const PairList list{keys, num_tokens * table.num_orders};
  for (size_t i = 0; i < list.count; ++i) {
    const int64_t key = list.key(i);
    const auto order = static_cast<uint8_t>(i % table.num_orders);
    const bool has_statics = key >= 0 && view.alive && table.statics.records != nullptr;
    const EntryIndex placed_keys = has_statics ? table.statics.areas[view.epoch & 1].order(order) : EntryIndex{};
    const uint32_t placed = placed_keys.find(placed_keys.find_bucket(key), key);
    if (key < 0) {
      sources[i] = kFromNowhere;
    } else if (table.resident != nullptr) {
      sources[i] = kFromResident;
    } else if (table.statics.loads(placed)) {
      sources[i] = kFromStatic;
    } else if (view.alive &&
               table.cache->probe(table.cache->find_set(table.tagged(order), key), table.tagged(order), key).way >= 0) {
      sources[i] = kFromRecency;
    } else {
      sources[i] = table.statics.place_in_file(order, key, placed) == kNotPlaced ? kFromPages : kFromRecord;
    }
  }
}

void Engine::count_batch(const Gathered& gathered) {
  counters.batches.fetch_add(1, kRelaxed);
  if (gathered.misses.empty()) counters.zero_miss_batches.fetch_add(1, kRelaxed);
}

// Counts what is asked for by row id: keys of whole tokens, which memory holds, or single rows.
void Engine::count_rows(size_t index, const PairList& ids, bool of_tokens) {
  const Table& table = tables_[index];
  const size_t rows_per_key = of_tokens ? table.rows_per_key : 1;
  uint64_t found_of[kOrdersMax] = {}, num_found = 0, num_keys = 0;
  for (size_t i = 0; i < ids.count; ++i) {
    const size_t place = ids.first + i;
    if (place % rows_per_key != 0) continue;  // a key's rows are all there, or none is
    const bool found = ids.key(i) >= 0;
    ++num_keys;
    num_found += found;
    found_of[of_tokens ? place / rows_per_key % table.num_orders : 0] += found;
  }
  if (!of_tokens) {
    counters.rows.fetch_add(num_found, kRelaxed);
    return;
  }
  for (size_t order = 0; order < table.num_orders; ++order)
    table_counters[index].hits[order].fetch_add(found_of[order], kRelaxed);
  counters.sentinels.fetch_add(num_keys - num_found, kRelaxed);
}

std::shared_ptr<Job> Engine::make_job(Gathered gathered,
                                      const std::vector<std::pair<size_t, uint8_t*>>& outputs) const {
  std::vector<uint8_t*> by_table(tables_.size(), nullptr);
  for (const auto& [table, out] : outputs) by_table[table] = out;
  return std::make_shared<Job>(std::move(gathered), std::move(by_table));
}

void Engine::fetch(const std::shared_ptr<Job>& job) {
  Carrier carrier(*this, job);
  while (carrier.run() == Carrier::State::kUnderWay) continue;
}

Engine::Carrier::~Carrier() {
  if (reader_ != nullptr) engine_.give_up(reader_, {FaultKind::kCancelled, 0, 0, 0});
}

Engine::Carrier::State Engine::Carrier::run() {
  // A fault that came later is no end: its page reader may have reads in flight.
  if (!begun_ && (job_->misses.empty() || job_->fault.kind != FaultKind::kNone)) return State::kDone;
  if (hands_on_ && engine_.hand_on(job_, reader_)) {
    reader_ = nullptr;
    return State::kHandedOn;
  }
  if (!begun_) {
    begun_ = true;
    started_ = Clock::now();
    if (job_->misses.size() > kSortHere) return State::kUnderWay;  // so that a worker may sort them
  }
  const Fault too_long{FaultKind::kTimeout, 0, 0, static_cast<int>(engine_.shape_.wait_s)};
  if (reader_ == nullptr) {
    reader_ = engine_.acquire_reader(kSliceMs, job_->fault);
    if (reader_ == nullptr) {
      if (job_->fault.kind != FaultKind::kNone) return State::kDone;
      if (Clock::now() - started_ < seconds(engine_.shape_.wait_s)) return State::kUnderWay;
      job_->fault = too_long;
      return State::kDone;
    }
    job_->sort();
    reader_->begin(*job_);
  }
  if (reader_->run(kSliceMs)) {
    engine_.release_reader(std::exchange(reader_, nullptr));
    return State::kDone;
  }
  if (reader_->stalled() >= seconds(engine_.shape_.wait_s)) {
    engine_.give_up(std::exchange(reader_, nullptr), too_long);
    return State::kDone;
  }
  return State::kUnderWay;
}

// Has a worker carry a job, begun with a page reader or not. Returns false, with nothing done, if there is no worker.
bool Engine::hand_on(const std::shared_ptr<Job>& job, PageReader* reader) {
  Runtime& runtime = *runtime_;
  const std::lock_guard<std::mutex> lock(runtime.mutex);
  if (!has_worker()) return false;
  job->self = job;
  runtime.under_way.add(*job);
  if (reader != nullptr) {
    runtime.handed.push(*reader);
  } else {
    runtime.pending.push(*job);
  }
  runtime.work_came.notify_one();
  return true;
}

Engine::Submitted Engine::submit(const std::shared_ptr<Job>& job) {
  Runtime& runtime = *runtime_;
  {
    const std::lock_guard<std::mutex> lock(runtime.mutex);
    if (runtime.under_way.size() >= shape_.jobs_max) return Submitted::kNoRoom;
    if (!has_worker()) return Submitted::kNoWorker;
    job->self = job;
    runtime.under_way.add(*job);
  }
  Fault why;  // if there are no page readers at all, the worker says so
  PageReader* reader = job->misses.size() <= kSortHere ? acquire_reader(0, why) : nullptr;
  if (reader != nullptr) {
    job->sort();
    reader->begin(*job);
  }
  const std::lock_guard<std::mutex> lock(runtime.mutex);
  if (reader != nullptr) {
    runtime.handed.push(*reader);
  } else {
    runtime.pending.push(*job);
  }
  runtime.work_came.notify_one();
  return Submitted::kUnderWay;
}

void Engine::wait_for_room() {
  Runtime& runtime = *runtime_;
  std::unique_lock<std::mutex> lock(runtime.mutex);
  runtime.job_ended.wait_for(lock, std::chrono::milliseconds(kSliceMs),
                             [&] { return runtime.under_way.size() < shape_.jobs_max; });
}

// Takes a page reader, within wait_ms. Null if none came free; and with a fault if there are none and none can be made.
PageReader* Engine::acquire_reader(int wait_ms, Fault& why) {
  Runtime& runtime = *runtime_;
  const auto until = Clock::now() + std::chrono::milliseconds(wait_ms);
  std::unique_lock<std::mutex> lock(runtime.mutex);
  for (;;) {
    PageReader* reader = take_reader();
    if (reader != nullptr) return reader;
    if (runtime.readers.empty()) {
      why = {FaultKind::kNoMemory, 0, 0, 0};
      return nullptr;
    }
    if (Clock::now() >= until) return nullptr;
    PageReader* left = runtime.workers.empty() ? runtime.handed.pop() : nullptr;
    if (left != nullptr) {  // nobody else will ever drain it
      lock.unlock();
      drain(left);
      lock.lock();
    } else {
      runtime.reader_freed.wait_until(lock, until, [&] { return runtime.reader_there(); });
    }
  }
}

// Takes a page reader that is free, or can be made now; else null. The runtime's lock is held.
PageReader* Engine::take_reader() {
  Runtime& runtime = *runtime_;
  if (!runtime.reader_there() || (runtime.free.empty() && !make_reader())) return nullptr;
  PageReader* reader = runtime.free.back();
  runtime.free.pop_back();
  return reader;
}

// Adds a free page reader. If there is no memory or descriptor for it, the store makes do with the page readers there
// are, and tries again later.
bool Engine::make_reader() {
  Runtime& runtime = *runtime_;
  try {
    std::unique_ptr<PageQueue> queue;
    if (shape_.mode == ReadMode::kUring) {
      queue = make_uring_queue(shape_.reader.depth);
    } else if (shape_.mode == ReadMode::kMmap) {
      queue = make_mmap_queue(shape_.reader.depth, shape_.use_process_madvise);
    } else {
      if (!runtime.pool) runtime.pool = PreadPool::make(shape_.pread_threads);
      queue = runtime.pool->make_queue(shape_.reader.depth);
    }
    runtime.readers.push_back(
        std::make_unique<PageReader>(tables_, shape_.reader, std::move(queue), faults, read_counters));
    runtime.free.push_back(runtime.readers.back().get());
    return true;
  } catch (const std::exception&) {
    runtime.make_again = Clock::now() + kMakeAgain;
    return false;
  }
}

void Engine::release_reader(PageReader* reader) {
  Runtime& runtime = *runtime_;
  const std::lock_guard<std::mutex> lock(runtime.mutex);
  runtime.free.push_back(reader);
  runtime.reader_freed.notify_one();
  if (!runtime.pending.empty()) runtime.work_came.notify_one();
}

// Ends a job whose reads do not end, or that nobody wants; its page reader is busy until they do.
void Engine::give_up(PageReader* reader, const Fault& fault) {
  reader->abandon(fault);
  Runtime& runtime = *runtime_;
  const std::lock_guard<std::mutex> lock(runtime.mutex);
  runtime.handed.push(*reader);
  if (has_worker()) {
    runtime.work_came.notify_one();
  } else {
    runtime.reader_freed.notify_one();
  }
}

// Goes on for a slice with a page reader that was given up on.
void Engine::drain(PageReader* reader) {
  if (reader->run(kSliceMs)) {
    release_reader(reader);
    return;
  }
  const std::lock_guard<std::mutex> lock(runtime_->mutex);
  runtime_->handed.push(*reader);
}

// Says whether there is a worker, after making one if not all are there. The runtime's lock is held.
bool Engine::has_worker() {
  Runtime& runtime = *runtime_;
  try {
    if (runtime.workers.size() < shape_.num_readers) runtime.workers.emplace_back([this] { work(); });
  } catch (const std::exception&) {  // the system gives no thread, or no memory for its stack
  }
  return !runtime.workers.empty();
}

void Engine::work() {
  Runtime& runtime = *runtime_;
  for (;;) {
    PageReader* reader = nullptr;
    Job* job = nullptr;
    {
      std::unique_lock<std::mutex> lock(runtime.mutex);
      runtime.work_came.wait(lock, [&] {
        return runtime.stopping || !runtime.handed.empty() || (!runtime.pending.empty() && runtime.reader_there());
      });
      reader = runtime.handed.pop();
      if (reader != nullptr) {
        job = reader->is_abandoned() ? nullptr : reader->job();
      } else if (runtime.stopping) {
        return;
      } else {
        // Job and page reader are taken at once: a worker that waited for a page reader could be the one that a begun
        // page reader waits for.
        reader = take_reader();
        if (reader == nullptr && !runtime.readers.empty()) continue;
        job = runtime.pending.pop();
      }
    }
    if (job != nullptr) {
      carry(reader, *job);
    } else {
      bool drained = false;
      while (!(drained = reader->run(kSliceMs)) && !closed_.load()) continue;
      if (drained) release_reader(reader);
    }
  }
}

// Carries a job, begun or not, to its end, and gives the page reader back. Reads that do not end keep their page
// reader. Without a page reader, none could be made.
void Engine::carry(PageReader* reader, Job& job) {
  job.note_begun();
  if (reader == nullptr) {
    job.fault = {FaultKind::kNoMemory, 0, 0, 0};
  } else if (reader->job() == nullptr && job.cancelled()) {
    job.fault = {FaultKind::kCancelled, 0, 0, 0};
    release_reader(reader);
  } else {
    if (reader->job() == nullptr) {
      job.sort();
      reader->begin(job);
    }
    bool ended = false;
    while (!(ended = reader->run(kSliceMs)) && reader->stalled() < seconds(shape_.wait_s)) continue;
    if (ended) {
      release_reader(reader);
    } else {
      give_up(reader, {FaultKind::kTimeout, 0, 0, static_cast<int>(shape_.wait_s)});
    }
  }
  finish(job);
}

// Ends a job that is under way. With the lock held, so that who forks finds it either under way or done.
void Engine::finish(Job& job) {
  latency.end(job.started);
  job.let_go();
  std::shared_ptr<Job> self;
  const std::lock_guard<std::mutex> lock(runtime_->mutex);
  runtime_->under_way.remove(job);
  self = std::move(job.self);
  job.finish();
  runtime_->job_ended.notify_all();
}

bool Engine::close(double limit_s) {
  closed_ = true;
  Runtime& runtime = *runtime_;
  {
    std::unique_lock<std::mutex> lock(runtime.mutex);
    const auto deadline = Clock::now() + seconds(limit_s);
    // Uses first: they alone bring jobs. A use ends without the mutex, for which it might wait with the interpreter's
    // lock, while who forks has it the other way.
    while (!gate_->is_empty()) {
      if (Clock::now() >= deadline) return false;
      runtime.use_ended.wait_for(lock, kLookAgain);
    }
    if (!runtime.job_ended.wait_until(lock, deadline, [&] { return runtime.under_way.size() == 0; })) return false;
    if (runtime.stopping) return runtime.use_ended.wait_until(lock, deadline, [&] { return runtime.ended; });
    runtime.stopping = true;
  }
  runtime.work_came.notify_all();
  for (std::thread& worker : runtime.workers) worker.join();
  runtime.workers.clear();
  runtime.free.clear();
  runtime.readers.clear();
  runtime.pool.reset();
  const std::lock_guard<std::mutex> lock(runtime.mutex);
  runtime.ended = true;
  runtime.use_ended.notify_all();
  return true;
}

void Engine::before_fork() {
  next_runtime_ = std::make_unique<Runtime>(shape_.num_readers);
  runtime_->mutex.lock();
  for (Table& table : tables_) {
    if (table.cache) table.cache->writer().lock();
  }
}

void Engine::after_fork(bool in_child) {
  for (Table& table : tables_) {
    if (table.cache) table.cache->writer().unlock();
  }
  runtime_->mutex.unlock();
  if (!in_child) {
    next_runtime_.reset();
    return;
  }
  // The parent's threads, their locks and their reads are not here. The old runtime is left as it lies.
  Runtime* old = runtime_.release();
  runtime_ = std::move(next_runtime_);
  for (const std::unique_ptr<PageReader>& reader : old->readers) reader->abandon_after_fork();
  if (gate_->is_shared()) closed_ = true;
  reports_.reset();
  gate_->forget();
  for (Job* job = old->under_way.first(); job != nullptr; job = job->after) job->end_after_fork();
}

}  // namespace tierstore
