#include "huge_pages.h"

#include <sys/mman.h>

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <memory>
#include <system_error>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

namespace tierstore {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::milliseconds kLookMax{300'000};  // between two looks
constexpr size_t kSlackBytes = 2 * kHugePageBytes;      // the block's ends, which huge pages may not fit
constexpr int kPauseFactor = 9;                         // of the time that a huge page took
constexpr std::chrono::microseconds kNothingDone{100};  // a call that took less moved no memory
constexpr size_t kCallsMax = 64;                        // such calls without a pause
constexpr size_t kRefusalsMax = 16;                     // in a row, of calls that took long: the kernel has no more

constexpr uint64_t kKiB = 1024;

// The value of a line "Name:   123 kB" of smaps; 0 if it is another line.
uint64_t bytes_of(const char* line, const char* name) {
  const size_t length = std::strlen(name);
  uint64_t kib = 0;
  if (std::strncmp(line, name, length) != 0 || std::sscanf(line + length, ": %" SCNu64 " kB", &kib) != 1) return 0;
  return kib * kKiB;
}

}  // namespace

bool read_huge_share(const uint8_t* memory, size_t num_bytes, HugeShare& share) {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen("/proc/self/smaps", "re"), &std::fclose);
  if (file == nullptr) return false;
  const auto block_start = reinterpret_cast<uintptr_t>(memory), block_end = block_start + num_bytes;
  HugeShare found;
  bool inside = false;
  char line[512];
  while (std::fgets(line, sizeof line, file.get()) != nullptr) {
    uintptr_t start, end;
    if (std::sscanf(line, "%" SCNxPTR "-%" SCNxPTR " ", &start, &end) == 2) {
      if (start >= block_end) break;  // mappings come in the order of their addresses
      inside = end > block_start;
    } else if (inside) {
      found.present_bytes += bytes_of(line, "Rss");
      for (const char* name : {"AnonHugePages", "ShmemPmdMapped", "FilePmdMapped"})
        found.huge_bytes += bytes_of(line, name);
    }
  }
  share.present_bytes = std::min<uint64_t>(found.present_bytes, num_bytes);
  share.huge_bytes = std::min(found.huge_bytes, share.present_bytes);
  return true;
}

HugePages::HugePages(uint8_t* memory, size_t num_bytes, std::chrono::milliseconds first_look)
    : memory_(memory), num_bytes_(num_bytes), first_look_(first_look) {}

bool HugePages::start() {
  try {
    thread_ = std::thread([this] { work(); });
  } catch (const std::system_error&) {
    return false;
  }
  return true;
}

void HugePages::stop() {
  const std::lock_guard<std::mutex> turn(ending_);
  if (!thread_.joinable()) return;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  stopped_.notify_all();
  thread_.join();
}

HugeShare HugePages::look() {
  HugeShare share;
  if (!read_huge_share(memory_, num_bytes_, share)) return last();
  present_bytes_.store(share.present_bytes, kRelaxed);
  huge_bytes_.store(share.huge_bytes, kRelaxed);
  return share;
}

// Returns false if the thread is to end.
bool HugePages::pause(std::chrono::nanoseconds length) {
  std::unique_lock<std::mutex> lock(mutex_);
  return !stopped_.wait_for(lock, length, [this] { return stopping_; });
}

void HugePages::work() {
  for (auto next = first_look_; pause(next); next = std::min(2 * next, kLookMax)) {
    const HugeShare share = look();
    if (share.huge_bytes + kSlackBytes >= share.present_bytes) continue;
    collapse_all();
    look();
  }
}

// One pass over the block. Where nothing is in memory, or a huge page is already, the kernel returns at once.
void HugePages::collapse_all() {
  const auto start = reinterpret_cast<uintptr_t>(memory_);
  const uintptr_t first = (start + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
  size_t refusals = 0, brief = 0;
  for (uintptr_t at = first; at + kHugePageBytes <= start + num_bytes_; at += kHugePageBytes) {
    const auto began = Clock::now();
    const bool done = madvise(reinterpret_cast<void*>(at), kHugePageBytes, MADV_COLLAPSE) == 0;
    const auto took = Clock::now() - began;
    if (took >= kNothingDone) {
      if (done) collapsed_bytes_.fetch_add(kHugePageBytes, kRelaxed);
      refusals = done ? 0 : refusals + 1;
      if (refusals == kRefusalsMax) return;
    } else if (++brief % kCallsMax != 0) {
      continue;
    }
    if (!pause(kPauseFactor * took)) return;
  }
}

}  // namespace tierstore
