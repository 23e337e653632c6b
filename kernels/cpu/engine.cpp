#include "engine.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <exception>
#include <list>
#include <mutex>
#include <new>
#include <optional>
#include <stdexcept>
#include <thread>
#include <utility>

#include "gather.h"

namespace tierstore {
namespace {

constexpr int kSliceMs = 200;  // how often a wait for the disk looks whether it should end
constexpr std::chrono::milliseconds kLookAgain{2};  // how often a closer looks whether all uses have ended
constexpr auto kRelaxed = std::memory_order_relaxed;

std::chrono::duration<double> seconds(double count) { return std::chrono::duration<double>(count); }

// Adds the keys of a list that are no sentinels, by order.
void count_keys(const PairList& list, size_t num_orders, uint64_t* keys_of) {
  if (list.pairs != nullptr) {
    for (size_t i = 0; i < list.count; ++i) keys_of[list.order(i, num_orders)] += list.keys[i] >= 0;
    return;
  }
  for (size_t pair = 0; pair < list.count;) {  // of whole tokens, without a division a pair
    for (size_t order = 0; order < num_orders; ++order) keys_of[order] += list.keys[pair++] >= 0;
  }
}

}  // namespace

// Lanes, workers and who waits for them. Made anew in a forked child, where the parent's threads are not.
struct Engine::Runtime {
  explicit Runtime(size_t num_lanes) : lanes_max(num_lanes) {}

  bool lane_there() const { return !free.empty() || lanes.size() < lanes_max; }

  struct Handed {
    Lane* lane;
    std::shared_ptr<Job> job;  // null: a lane that was given up on, to be drained
  };

  std::mutex mutex;
  std::condition_variable lane_freed, work_came, job_ended, use_ended;
  std::unique_ptr<PreadPool> pool;
  std::vector<std::unique_ptr<Lane>> lanes;
  std::vector<Lane*> free;
  std::deque<Handed> handed;                // begun
  std::deque<std::shared_ptr<Job>> pending;  // waiting for a lane
  std::list<std::shared_ptr<Job>> unfinished;  // all that were submitted and are not done
  std::vector<std::thread> workers;
  size_t lanes_max;
  bool stopping = false;  // somebody closes the engine,
  bool ended = false;     // and has: nothing of this is used any more
};

Engine::Engine(std::vector<Table> tables, const EngineShape& shape)
    : tables_(std::move(tables)),
      shape_(shape),
      runtime_(std::make_unique<Runtime>(shape.num_lanes)),
      gate_(shape.epochs == nullptr
                ? std::make_unique<EpochGate>()
                : std::make_unique<EpochGate>(shape.epochs, shape.version, &ClientBlock::of(shape.client_block)->active[0].value,
                                              &ClientBlock::of(shape.client_block)->active[1].value)) {
  if (shape.reports) reports_ = std::make_unique<ReportWriter>(shape.client_block);
  for (const Table& table : tables_) table_counters.emplace_back(table.num_orders);
  while (runtime_->lanes.size() < shape.num_lanes && make_lane()) continue;  // now, so that it is known whether they all are there
  if (runtime_->lanes.empty()) throw std::runtime_error("no lane: out of memory, descriptors or locked memory");
}

Engine::~Engine() {
  if (!close(shape_.wait_s)) runtime_.release();
}

size_t Engine::num_lanes() const {
  const std::lock_guard<std::mutex> lock(runtime_->mutex);
  return runtime_->lanes.size();
}

void Engine::gather(const EpochView& view, size_t index, const PairList& list, uint8_t* out, Job& job) {
  const Table& table = tables_[index];
  const size_t first_miss = job.misses.size();
  uint64_t keys_of[kOrdersMax] = {}, misses_of[kOrdersMax] = {}, static_hits[kOrdersMax] = {};
  job.outputs.resize(tables_.size());
  job.outputs[index] = out;
  if (table.resident != nullptr) {
    const int64_t bad_page = gather_resident(table, list, out);
    if (bad_page >= 0) job.fault = {FaultKind::kBadPage, static_cast<uint32_t>(index), bad_page, kPageBadChecksum};
  } else {
    std::optional<ReportSink> reports;
    if (reports_ != nullptr) reports.emplace(*reports_, static_cast<uint16_t>(index));
    bool holds = view.alive;
    if (holds) {
      gather_cached(table, view.epoch, static_cast<uint16_t>(index), list, out, job.misses, static_hits,
                    reports ? &*reports : nullptr);
      holds = gate_->holds(view);
    }
    if (!holds) {
      job.misses.resize(first_miss);
      std::fill_n(static_hits, table.num_orders, uint64_t{0});
      gather_nothing(table, static_cast<uint16_t>(index), list, out, job.misses);
    }
    table.cache->count_accesses(list.count);
  }
  count_keys(list, table.num_orders, keys_of);
  for (size_t i = first_miss; i < job.misses.size(); ++i) ++misses_of[job.misses[i].order];
  uint64_t num_keys = 0;
  for (size_t order = 0; order < table.num_orders; ++order) {
    table_counters[index].hits[order].fetch_add(keys_of[order] - misses_of[order], kRelaxed);
    if (static_hits[order] > 0) table_counters[index].static_hits[order].fetch_add(static_hits[order], kRelaxed);
    if (misses_of[order] > 0) table_counters[index].misses[order].fetch_add(misses_of[order], kRelaxed);
    num_keys += keys_of[order];
  }
  if (num_keys < list.count) counters.sentinels.fetch_add(list.count - num_keys, kRelaxed);
}

void Engine::locate(const EpochView& view, size_t index, const int64_t* keys, size_t num_tokens, uint8_t* sources) {
  const Table& table = tables_[index];
  for (size_t i = 0; i < num_tokens * table.num_orders; ++i) {
    const auto order = static_cast<uint8_t>(i % table.num_orders);
    const bool has_statics = keys[i] >= 0 && view.alive && table.statics.records != nullptr;
    const EntryIndex placed_keys = has_statics ? table.statics.areas[view.epoch & 1].order(order) : EntryIndex{};
    const uint32_t placed = placed_keys.find(placed_keys.find_bucket(keys[i]), keys[i]);
    if (keys[i] < 0) {
      sources[i] = kFromNowhere;
    } else if (table.resident != nullptr) {
      sources[i] = kFromResident;
    } else if (table.statics.loads(placed)) {
      sources[i] = kFromStatic;
    } else if (view.alive && table.cache->probe(table.cache->find_set(table.tagged(order), keys[i]), table.tagged(order), keys[i]).way >= 0) {
      sources[i] = kFromRecency;
    } else {
      sources[i] = table.statics.place_in_file(order, keys[i], placed) == kNotPlaced ? kFromPages : kFromRecord;
    }
  }
}

void Engine::count_batch(const Job& job) {
  counters.batches.fetch_add(1, kRelaxed);
  if (job.misses.empty()) counters.zero_miss_batches.fetch_add(1, kRelaxed);
}

// Counts what is asked for by row id: keys of whole tokens, which memory holds, or single rows.
void Engine::count_rows(size_t index, const int64_t* ids, size_t num_ids, bool of_tokens) {
  const Table& table = tables_[index];
  const size_t rows_per_key = of_tokens ? table.rows_per_key : 1;
  uint64_t found_of[kOrdersMax] = {}, num_found = 0;
  for (size_t i = 0; i < num_ids; i += rows_per_key) {  // a key's rows are all there, or none is
    found_of[of_tokens ? i / rows_per_key % table.num_orders : 0] += ids[i] >= 0;
    num_found += ids[i] >= 0;
  }
  if (!of_tokens) {
    counters.rows.fetch_add(num_found, kRelaxed);
    return;
  }
  for (size_t order = 0; order < table.num_orders; ++order) table_counters[index].hits[order].fetch_add(found_of[order], kRelaxed);
  counters.sentinels.fetch_add(num_ids / rows_per_key - num_found, kRelaxed);
}

void Engine::read(size_t index, const int64_t* ids, size_t num_ids, uint8_t* out, uint8_t unit, bool of_tokens, Job& job) {
  const Table& table = tables_[index];
  if (unit == kRowUnit) count_rows(index, ids, num_ids, of_tokens && table.resident != nullptr);
  if (unit == kRowUnit && table.resident != nullptr) {
    const int64_t bad_page = gather_resident_rows(table, ids, num_ids, out);
    if (bad_page >= 0) job.fault = {FaultKind::kBadPage, static_cast<uint32_t>(index), bad_page, kPageBadChecksum};
    count_batch(job);
    return;
  }
  job.outputs.resize(tables_.size());
  job.outputs[index] = out;
  for (size_t i = 0; i < num_ids; ++i) {
    if (ids[i] < 0) {
      std::memset(out + i * table.row_bytes, 0, table.row_bytes);
    } else {
      job.misses.push_back({ids[i], static_cast<uint32_t>(i), static_cast<uint16_t>(index), unit, kNotPlaced});
    }
  }
  if (unit == kRowUnit) {
    counters.rows_missed.fetch_add(job.misses.size(), kRelaxed);
    count_batch(job);
  }
  fetch(job);
}

void Engine::fetch(Job& job) {
  if (job.misses.empty() || job.fault.kind != FaultKind::kNone) return;
  job.sort();
  Lane* lane = acquire_lane(true);
  if (lane == nullptr) {  // none came free in time, or none can be made
    job.fault = {FaultKind::kTimeout, 0, 0, static_cast<int>(shape_.wait_s)};
    return;
  }
  drive(*lane, job);
}

void Engine::submit(const std::shared_ptr<Job>& job) {
  job->sort();
  Runtime& runtime = *runtime_;
  {
    std::unique_lock<std::mutex> lock(runtime.mutex);
    const auto room = [&] { return runtime.unfinished.size() < shape_.jobs_max; };
    if (!runtime.job_ended.wait_for(lock, seconds(shape_.wait_s), room)) {
      job->fault = {FaultKind::kTimeout, 0, 0, static_cast<int>(shape_.wait_s)};
      lock.unlock();
      job->finish();
      return;
    }
    runtime.unfinished.push_back(job);
    if (runtime.workers.size() < shape_.num_lanes) runtime.workers.emplace_back([this] { work(); });
  }
  Lane* lane = acquire_lane(false);
  if (lane != nullptr) lane->begin(*job);
  const std::lock_guard<std::mutex> lock(runtime.mutex);
  if (lane != nullptr) {
    runtime.handed.push_back({lane, job});
  } else if (runtime.lanes_max > 0) {
    runtime.pending.push_back(job);
  } else {  // no lane can be made: nobody will ever come for the job
    job->fault = {FaultKind::kTimeout, 0, 0, 0};
    runtime.unfinished.remove(job);
    job->finish();
  }
  runtime.work_came.notify_one();
}

Lane* Engine::acquire_lane(bool wait) {
  Runtime& runtime = *runtime_;
  std::unique_lock<std::mutex> lock(runtime.mutex);
  const auto there = [&] { return runtime.lane_there(); };
  if (!there() && (!wait || !runtime.lane_freed.wait_for(lock, seconds(shape_.wait_s), there))) return nullptr;
  return take_lane();
}

// Takes a lane that is there; null where it would have to be made and cannot be. The runtime's lock is held.
Lane* Engine::take_lane() {
  Runtime& runtime = *runtime_;
  if (runtime.free.empty() && !make_lane()) return nullptr;
  Lane* lane = runtime.free.back();
  runtime.free.pop_back();
  return lane;
}

// Adds a free lane. Where there is no memory or descriptor for it, the store makes do with the lanes there are.
bool Engine::make_lane() {
  Runtime& runtime = *runtime_;
  try {
    std::unique_ptr<PageQueue> queue;
    if (shape_.mode == ReadMode::kUring) {
      queue = make_uring_queue(shape_.lane.depth);
    } else if (shape_.mode == ReadMode::kMmap) {
      queue = make_mmap_queue(shape_.use_process_madvise);
    } else {
      if (!runtime.pool) runtime.pool = PreadPool::make(shape_.pread_threads);
      queue = runtime.pool->make_queue();
    }
    runtime.lanes.push_back(std::make_unique<Lane>(tables_, shape_.lane, std::move(queue), faults, read_counters));
    runtime.free.push_back(runtime.lanes.back().get());
    return true;
  } catch (const std::exception&) {
    runtime.lanes_max = runtime.lanes.size();
    return false;
  }
}

void Engine::release_lane(Lane* lane) {
  Runtime& runtime = *runtime_;
  const std::lock_guard<std::mutex> lock(runtime.mutex);
  runtime.free.push_back(lane);
  runtime.lane_freed.notify_one();
  if (!runtime.pending.empty()) runtime.work_came.notify_one();
}

// Carries a job, begun or not, to its end, and gives the lane back. Reads that do not end keep their lane.
void Engine::drive(Lane& lane, Job& job) {
  if (!lane.has_job()) lane.begin(job);
  bool ended = false;
  while (!(ended = lane.run(kSliceMs)) && lane.stalled() < seconds(shape_.wait_s)) continue;
  if (ended) {
    release_lane(&lane);
    return;
  }
  lane.disown({FaultKind::kTimeout, 0, 0, static_cast<int>(shape_.wait_s)});
  const std::lock_guard<std::mutex> lock(runtime_->mutex);
  runtime_->handed.push_back({&lane, nullptr});
  if (runtime_->workers.size() < shape_.num_lanes) runtime_->workers.emplace_back([this] { work(); });
  runtime_->work_came.notify_one();
}

void Engine::work() {
  Runtime& runtime = *runtime_;
  for (;;) {
    Runtime::Handed task{nullptr, nullptr};
    {
      std::unique_lock<std::mutex> lock(runtime.mutex);
      runtime.work_came.wait(lock, [&] {
        return runtime.stopping || !runtime.handed.empty() || (!runtime.pending.empty() && runtime.lane_there());
      });
      if (!runtime.handed.empty()) {
        task = runtime.handed.front();
        runtime.handed.pop_front();
      } else if (runtime.stopping) {
        return;
      } else {
        // Job and lane are taken at once: a worker that waited for a lane could be the one that a begun lane waits for.
        task.lane = take_lane();
        if (task.lane == nullptr) continue;
        task.job = runtime.pending.front();
        runtime.pending.pop_front();
      }
    }
    if (task.job == nullptr) {
      bool drained = false;
      while (!(drained = task.lane->run(kSliceMs)) && !closed_.load()) continue;
      if (drained) release_lane(task.lane);
      continue;
    }
    drive(*task.lane, *task.job);
    {
      const std::lock_guard<std::mutex> lock(runtime.mutex);
      runtime.unfinished.remove(task.job);
      runtime.job_ended.notify_all();
    }
    latency.end(task.job->started);
    task.job->finish();
  }
}

bool Engine::close(double limit_s) {
  closed_ = true;
  Runtime& runtime = *runtime_;
  {
    std::unique_lock<std::mutex> lock(runtime.mutex);
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration_cast<std::chrono::steady_clock::duration>(
                                                                 seconds(limit_s));
    if (!runtime.job_ended.wait_until(lock, deadline, [&] { return runtime.unfinished.empty(); })) return false;
    // A use ends without the mutex, for which it might wait with the interpreter's lock, while who forks has it the other way.
    while (!gate_->is_empty()) {
      if (std::chrono::steady_clock::now() >= deadline) return false;
      runtime.use_ended.wait_for(lock, kLookAgain);
    }
    if (runtime.stopping) return runtime.use_ended.wait_until(lock, deadline, [&] { return runtime.ended; });
    runtime.stopping = true;
  }
  runtime.work_came.notify_all();
  for (std::thread& worker : runtime.workers) worker.join();
  runtime.workers.clear();
  runtime.free.clear();
  runtime.lanes.clear();
  runtime.pool.reset();
  const std::lock_guard<std::mutex> lock(runtime.mutex);
  runtime.ended = true;
  runtime.use_ended.notify_all();
  return true;
}

void Engine::before_fork() {
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
  if (!in_child) return;
  // The parent's threads, their locks and their reads are not here. The old runtime is left as it lies.
  Runtime* old = runtime_.release();
  for (const std::unique_ptr<Lane>& lane : old->lanes) lane->abandon_after_fork();
  runtime_ = std::make_unique<Runtime>(shape_.num_lanes);
  if (gate_->is_shared()) closed_ = true;
  reports_.reset();
  gate_->forget();
  for (const std::shared_ptr<Job>& job : old->unfinished) {
    job->fault = {FaultKind::kForked, 0, 0, 0};
    new (&job->mutex) std::mutex;
    new (&job->changed) std::condition_variable;
    job->done = true;
  }
}

}  // namespace tierstore
