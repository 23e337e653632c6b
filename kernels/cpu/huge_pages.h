// Brings a block of memory onto huge pages while it is in use, and knows how much of it lies on them.
//
// The kernel gives huge pages at the first touch if it has some at hand, and its own khugepaged collapses small ones
// later, some megabytes in ten seconds. A thread here asks for the rest (MADV_COLLAPSE, Linux 6.1, which works where
// transparent huge pages are switched off, too), one huge page at a time, with pauses nine times as long as the work:
// a tenth of a core at most. While a huge page is put together, about a millisecond, a reader of its 2 MiB waits in the
// kernel; all others go on. Where nothing is left to do it looks again every few minutes, as caches fill.
#pragma once

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <thread>
#include <utility>

namespace tierstore {

constexpr size_t kHugePageBytes = 2 << 20;

// Bytes of a block that are in memory, and those of them that lie on huge pages.
struct HugeShare {
  uint64_t present_bytes = 0, huge_bytes = 0;
};

// Reads it from the kernel's list of this process's mappings, smaps. Of a mapping that reaches beyond the block, all
// counts, up to the block's size. Costs some milliseconds for each GiB on small pages. Returns false if the list cannot
// be read.
bool read_huge_share(const uint8_t* memory, size_t num_bytes, HugeShare& share);

class HugePages {
 public:
  // The memory outlives this. first_look: after the start.
  HugePages(uint8_t* memory, size_t num_bytes, std::chrono::milliseconds first_look);
  ~HugePages() { stop(); }
  HugePages(const HugePages&) = delete;
  HugePages& operator=(const HugePages&) = delete;

  // Starts the thread. Returns false if the system gives none; nothing is collapsed then.
  bool start();
  // Ends the thread; blocks for what the kernel is at, some milliseconds at most. Any threads, any number of times.
  void stop();
  // Whether this is the process that made it. In a forked child there is no thread: nothing is stopped or destroyed.
  bool is_here() const { return owner_ == getpid(); }

  // What the last look found, without a look: zeros before the first.
  HugeShare last() const { return {present_bytes_.load(kRelaxed), huge_bytes_.load(kRelaxed)}; }
  // Looks now.
  HugeShare look();
  // Bytes that were collapsed here.
  uint64_t collapsed_bytes() const { return collapsed_bytes_.load(kRelaxed); }

 private:
  static constexpr auto kRelaxed = std::memory_order_relaxed;

  void work();
  bool pause(std::chrono::nanoseconds length);
  void collapse_all();

  uint8_t* const memory_;
  const size_t num_bytes_;
  const std::chrono::milliseconds first_look_;
  std::atomic<uint64_t> present_bytes_{0}, huge_bytes_{0}, collapsed_bytes_{0};
  std::mutex ending_;  // held by who waits for the thread: two may not join it
  std::mutex mutex_;   // guards stopping_
  std::condition_variable stopped_;
  bool stopping_ = false;
  std::thread thread_;
  const pid_t owner_ = getpid();
};

}  // namespace tierstore
