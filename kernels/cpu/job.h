// One request on its way: what no cache held of it, where the bytes go, and how it ended.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <tuple>
#include <vector>

#include "entry_index.h"

namespace tierstore {

// What is read at once: the rows of a key of some order, or, by these two in place of an order, one row or one page.
constexpr uint8_t kRowUnit = 254;
constexpr uint8_t kPageUnit = 255;
constexpr size_t kOrdersMax = 16;

// What is asked for of one table. keys: [count], -1 for zero rows. pairs: [count], not below 0: key i is of order pairs[i] % O; null where
// the keys are of whole tokens, and so of orders 0, 1, ..., O - 1, 0, 1, ...
struct PairList {
  const int64_t* keys;
  size_t count;
  const int32_t* pairs = nullptr;

  uint8_t order(size_t i, size_t num_orders) const {
    return static_cast<uint8_t>((pairs == nullptr ? i : static_cast<uint32_t>(pairs[i])) % num_orders);
  }
};

struct Miss {
  int64_t key;     // a key, a row id or a page number
  uint32_t place;  // which entry, row or page of the table's output it fills
  uint16_t table;
  uint8_t order;
  uint32_t placed;  // where its record lies in the placement file, kNotPlaced where it has none

  bool same_unit(const Miss& other) const {
    return key == other.key && table == other.table && order == other.order;
  }
};

enum class FaultKind { kNone, kBadPage, kDisk, kTimeout, kForked, kBadEntry };

struct Fault {
  FaultKind kind = FaultKind::kNone;
  uint32_t table = 0;
  int64_t page = 0;  // of kBadEntry, the entry's place
  int detail = 0;    // a PageStatus, an errno, kCutShort, or seconds
};

// Filled by the thread that submits, read by the thread that fetches, waited for by any. `outputs[t]` is table t's buffer.
struct Job {
  std::vector<Miss> misses;
  std::vector<uint8_t*> outputs;
  Fault fault;
  std::chrono::steady_clock::time_point started{};  // of a job that is timed: when it was asked for

  // Brings equal units together, so that each is read once.
  void sort() {
    std::sort(misses.begin(), misses.end(), [](const Miss& a, const Miss& b) {
      return std::tie(a.table, a.order, a.key) < std::tie(b.table, b.order, b.key);
    });
  }

  void finish() {
    {
      const std::lock_guard<std::mutex> lock(mutex);
      done = true;
    }
    changed.notify_all();
  }

  bool is_done() {
    const std::lock_guard<std::mutex> lock(mutex);
    return done;
  }

  // Returns whether the job was done within `seconds`.
  bool wait(double seconds) {
    std::unique_lock<std::mutex> lock(mutex);
    return changed.wait_for(lock, std::chrono::duration<double>(seconds), [this] { return done; });
  }

  std::mutex mutex;
  std::condition_variable changed;
  bool done = false;
};

}  // namespace tierstore
