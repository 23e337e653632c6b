// Page readers, workers and the jobs that wait for them: the part of an engine that its mutex guards.
#pragma once

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "crew.h"
#include "engine.h"
#include "line.h"

namespace tierstore {

// A number of seconds, as steady clocks count.
inline std::chrono::steady_clock::duration clock_seconds(double count) {
  return std::chrono::duration_cast<std::chrono::steady_clock::duration>(std::chrono::duration<double>(count));
}

// Made anew in a forked child, where the parent's threads are not. It has room for all page readers and workers from
// the start, so that none is lost for want of memory.
struct Engine::Runtime {
  using Clock = std::chrono::steady_clock;

  Runtime(size_t num_readers, size_t num_threads) : crew(num_threads), readers_max(num_readers) {
    readers.reserve(num_readers);
    free.reserve(num_readers);
    workers.reserve(num_readers);
  }

  bool reader_there() const { return !free.empty() || (readers.size() < readers_max && Clock::now() >= make_again); }

  Crew crew;         // of large lookups of what memory holds
  std::mutex mutex;  // guards everything below; `pool` and the readers themselves are used without it
  std::condition_variable reader_freed, work_came, job_ended, use_ended;
  std::unique_ptr<PreadPool> pool;
  std::vector<std::unique_ptr<PageReader>> readers;
  std::vector<PageReader*> free;
  Line<PageReader> handed;  // with a job that was begun; or abandoned, to be drained
  Line<Job> pending;        // waiting for a page reader
  Ring<Job> under_way;      // all that a worker carries or will
  std::vector<std::thread> workers;
  const size_t readers_max;
  Clock::time_point make_again{};
  bool stopping = false;  // somebody closes the engine,
  bool ended = false;     // and has: nothing of this is used any more
};

}  // namespace tierstore
