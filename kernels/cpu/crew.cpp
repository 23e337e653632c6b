#include "crew.h"

#include <algorithm>

namespace tierstore {

void Crew::Task::take_parts(std::mutex& mutex) noexcept {
  try {
    for (size_t part; (part = next.fetch_add(1, std::memory_order_relaxed)) < num_parts;) work(part);
  } catch (...) {
    next.store(num_parts, std::memory_order_relaxed);
    const std::lock_guard<std::mutex> lock(mutex);
    if (!thrown) thrown = std::current_exception();
  }
}

Crew::Crew(size_t num_threads) : num_threads_(num_threads) {
  CPU_ZERO(&cores_);
  sched_getaffinity(0, sizeof cores_, &cores_);  // if that fails, threads stay where they were started
}

void Crew::run(size_t num_parts, const std::function<void(size_t)>& work, size_t threads_max) {
  if (num_parts == 0) return;
  const std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
  Task task{work, num_parts};
  const size_t helpers = std::min({num_parts, num_threads_, std::max(threads_max, size_t{1})}) - 1;
  const bool shared = turn.owns_lock() && helpers > 0;
  if (shared) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      start_threads(helpers);
      task_ = &task;
      ++task_number_;
    }
    for (size_t i = 0; i < helpers; ++i) came_.notify_one();
  }
  task.take_parts(mutex_);
  if (shared) {
    std::unique_lock<std::mutex> lock(mutex_);
    task_ = nullptr;  // who wakes up now comes too late
    ended_.wait(lock, [this] { return at_work_ == 0; });
  }
  if (task.thrown) std::rethrow_exception(task.thrown);
}

// Starts threads until there are so many. If the system gives none, the caller works alone.
void Crew::start_threads(size_t num_threads) {
  try {
    threads_.reserve(num_threads_ - 1);
    while (threads_.size() < num_threads) threads_.emplace_back([this] { serve(); });
  } catch (const std::exception&) {
  }
}

void Crew::serve() {
  if (CPU_COUNT(&cores_) > 0) sched_setaffinity(0, sizeof cores_, &cores_);
  size_t seen = 0;
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    came_.wait(lock, [&] { return stopping_ || (task_ != nullptr && task_number_ != seen); });
    if (stopping_) return;
    seen = task_number_;
    Task* task = task_;
    ++at_work_;
    lock.unlock();
    task->take_parts(mutex_);
    lock.lock();
    if (--at_work_ == 0) ended_.notify_all();
  }
}

void Crew::stop() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  came_.notify_all();
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
}

}  // namespace tierstore
