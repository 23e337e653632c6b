// Faults on purpose, for tests: the n-th page read fails, comes short, is corrupt or slow. Off, it costs one load a
// page.
#pragma once

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <thread>

#include "page_queue.h"

namespace tierstore {

enum class FaultInjection : int { kNone, kFailing, kShort, kCorrupt, kSlow };

class alignas(64) FaultPlan {  // read with every page: on no line that others write to
 public:
  // Reads number `first` .. `first + count - 1` from now on suffer `what`.
  void set(FaultInjection what, uint64_t first, uint64_t count) {
    what_ = FaultInjection::kNone;
    seen_ = 0;
    first_ = first;
    count_ = count;
    what_ = what;
  }

  // The same by name, as tests say it. Throws std::invalid_argument.
  void set(const std::string& what, uint64_t first, uint64_t count) {
    static const char* const kNames[] = {"none", "failing", "short", "corrupt", "slow"};
    for (int i = 0; i < 5; ++i) {
      if (what == kNames[i]) return set(static_cast<FaultInjection>(i), first, count);
    }
    throw std::invalid_argument("what must be none, failing, short, corrupt or slow");
  }

  bool is_on() const { return what_.load(std::memory_order_relaxed) != FaultInjection::kNone; }
  uint64_t seen() const { return seen_; }

  // Applied to every page that arrives, before it is checked.
  void apply(PageDone& done, uint8_t* page, size_t page_bytes) {
    const FaultInjection what = what_;
    if (what == FaultInjection::kNone) return;
    const uint64_t number = seen_++;
    if (number < first_ || number - first_ >= count_) return;
    if (what == FaultInjection::kFailing) done.error = EIO;
    if (what == FaultInjection::kShort) done.error = kCutShort;
    if (what == FaultInjection::kCorrupt) page[number * 997 % page_bytes] ^= 1;
    if (what == FaultInjection::kSlow) std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }

 private:
  std::atomic<FaultInjection> what_{FaultInjection::kNone};
  std::atomic<uint64_t> seen_{0}, first_{0}, count_{0};
};

}  // namespace tierstore
