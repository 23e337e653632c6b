// Jobs on their way: carried by the caller's thread, handed to workers, given up, finished.
#include <algorithm>
#include <chrono>
#include <exception>
#include <mutex>
#include <utility>

#include "engine.h"
#include "engine_runtime.h"

namespace tierstore {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::milliseconds kMakeAgain{1000};  // before a page reader is tried for again that could not be made
constexpr size_t kSortHere = 1 << 18;  // misses; more would take a caller too long, and a worker sorts them

}  // namespace

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
      if (Clock::now() - started_ < clock_seconds(engine_.shape_.wait_s)) return State::kUnderWay;
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
  if (reader_->stalled() >= clock_seconds(engine_.shape_.wait_s)) {
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
    reader->send();
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

// Takes a page reader, within wait_ms. Null if none came free; and with a fault if it has no reader and can make none.
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
      queue = make_uring_queue(shape_.reader.depth, files_);
    } else if (shape_.mode == ReadMode::kMmap) {
      queue = make_mmap_queue(shape_.reader.depth, shape_.use_process_madvise);
    } else if (shape_.mode == ReadMode::kServed) {
      const size_t slot_bytes = shape_.reader.page_bytes;
      queue = make_served_queue(shape_.reader.depth, slot_bytes, shape_.served_by, shape_.served_wait_s);
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
    while (!(ended = reader->run(kSliceMs)) && reader->stalled() < clock_seconds(shape_.wait_s)) continue;
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

}  // namespace tierstore
