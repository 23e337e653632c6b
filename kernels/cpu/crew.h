// A few threads that share one large piece of work with the thread that brings it.
//
// The work is split into parts, which the caller and the crew take one after another: who is slow takes fewer. One
// caller has the crew at a time; others, who would only take its processors, do their parts alone. The threads start
// with the first work, and sleep between.
#pragma once

#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace tierstore {

class Crew {
 public:
  // num_threads: at work at once, the caller's included.
  explicit Crew(size_t num_threads);
  ~Crew() { stop(); }
  Crew(const Crew&) = delete;
  Crew& operator=(const Crew&) = delete;

  size_t num_threads() const { return num_threads_; }

  // Calls work(0) to work(num_parts - 1), each once, on this thread and others; returns when all have ended. Work must
  // be short and not wait for another part, nor call this. At most `threads_max` threads are woken, less the caller's.
  // Rethrows the first exception; other parts may be left out then.
  void run(size_t num_parts, const std::function<void(size_t)>& work, size_t threads_max = SIZE_MAX);

  // Ends the threads; nobody is in `run`, and nobody calls it afterwards.
  void stop();

 private:
  struct Task {
    const std::function<void(size_t)>& work;
    const size_t num_parts;
    std::atomic<size_t> next{0};
    std::exception_ptr thrown{};  // guarded by the crew's mutex

    void take_parts(std::mutex& mutex) noexcept;
  };

  void start_threads(size_t num_threads);
  void serve();

  const size_t num_threads_;
  cpu_set_t cores_;   // of the thread that made the crew: whoever brings work may be bound to fewer
  std::mutex turn_;   // held by the caller who has the crew
  std::mutex mutex_;  // guards everything below
  std::condition_variable came_, ended_;
  Task* task_ = nullptr;
  size_t task_number_ = 0;  // of tasks so far, so that no thread joins one twice
  size_t at_work_ = 0;      // threads, besides the caller's, that may touch the task
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace tierstore
