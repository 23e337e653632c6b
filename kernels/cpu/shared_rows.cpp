#include "shared_rows.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <memory>

#include "crew.h"

namespace tierstore {
namespace {

// Never taken apart: at the end of the process, its threads sleep.
std::atomic<Crew*> process_crew{nullptr};

// The parent's threads are not in a forked child, and its locks may be held for good: the child leaves them as they
// lie. Registered as the library is loaded, because a fork in the middle of a later registration would leave that one's
// lock.
[[maybe_unused]] const int kForgottenByChildren =
    pthread_atfork(nullptr, nullptr, [] { process_crew.store(nullptr, std::memory_order_relaxed); });

Crew& crew_of_process() {
  Crew* crew = process_crew.load(std::memory_order_acquire);
  if (crew != nullptr) return *crew;
  auto made = std::make_unique<Crew>(kShareThreadsMax);  // threads start as they are needed
  if (!process_crew.compare_exchange_strong(crew, made.get(), std::memory_order_acq_rel)) return *crew;
  return *made.release();
}

}  // namespace

void share_rows(size_t num_rows, size_t rows_each, size_t num_threads,
                const std::function<void(size_t start, size_t end)>& work) {
  const size_t num_ranges = num_rows / std::max(rows_each, size_t{1});
  if (num_threads < 2 || num_ranges < kSharedRangesMin) {
    if (num_rows > 0) work(0, num_rows);
    return;
  }
  crew_of_process().run(
      num_ranges, [&](size_t range) { work(num_rows * range / num_ranges, num_rows * (range + 1) / num_ranges); },
      num_threads);
}

}  // namespace tierstore
