// One request on its way: what no cache held of it, where the bytes go, what keeps those alive, and how it ended.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <tuple>
#include <utility>
#include <vector>

#include "entry_index.h"
#include "rows_out.h"

namespace tierstore {

constexpr size_t kOrdersMax = 16;
// In place of an order: the request is for one row, by its id, and not for the rows of a key.
constexpr uint8_t kRowRequest = 254;

// What is asked for of one table. keys: [count], -1 for zero rows. pairs: [count], not below 0: key i is of order
// pairs[i] % O; null if the keys are of whole tokens, and so of orders 0, 1, ..., O - 1, 0, 1, ... first: which entry
// of the table's output key 0 fills. The caller's memory may change at any time: `key` and `pair` load a value once,
// and whoever checks it uses what was loaded.
struct PairList {
  const int64_t* keys;
  size_t count;
  const int32_t* pairs = nullptr;
  size_t first = 0;

  int64_t key(size_t i) const { return __atomic_load_n(keys + i, __ATOMIC_RELAXED); }
  int32_t pair(size_t i) const { return __atomic_load_n(pairs + i, __ATOMIC_RELAXED); }

  // At most `size` of its pairs, from `start` on.
  PairList part(size_t start, size_t size) const {
    return {keys + start, std::min(size, count - start), pairs == nullptr ? nullptr : pairs + start, first + start};
  }
};

// Where the rows of a request go: entry (or row) i to rows + i * its bytes. sources: what answered pair i, a Source;
// null: not wanted. Sources are written only until the caller's `Engine::gather` returns.
struct Output {
  Output(uint8_t* rows, uint8_t* sources = nullptr) : rows(rows), sources(sources) {}
  uint8_t* rows;
  uint8_t* sources;
};

struct Miss {
  int64_t key;     // a key, or a row id
  uint32_t index;  // which entry or row of the table's output it fills
  uint16_t table;
  uint8_t order;           // or kRowRequest
  uint32_t record_number;  // in the placement file; kNotPlaced if it has no record there

  bool same_request(const Miss& other) const {
    return key == other.key && table == other.table && order == other.order;
  }
};

// The last three never come from a page reader: the engine was closed; a key, a row id or a pair is not one of the
// table's; the caller's own time limit was over.
enum class FaultKind {
  kNone,
  kBadPage,
  kDisk,
  kTimeout,
  kForked,
  kBadEntry,
  kNoMemory,
  kCancelled,
  kClosed,
  kOutside,
  kOverdue
};

struct Fault {
  FaultKind kind = FaultKind::kNone;
  uint32_t table = 0;
  int64_t page = 0;  // of kBadEntry, the number of its record
  int detail = 0;    // a PageStatus, an errno, kCutShort, or seconds
};

// What memory did not hold of a batch, and what was wrong with what it held. Filled by `Engine::gather`.
struct Gathered {
  std::vector<Miss> misses;
  Fault fault;
};

// Keeps alive what a job writes to. `release` comes once, from any thread, when nothing is written any more.
class Held {
 public:
  virtual void release() noexcept = 0;

 protected:
  ~Held() = default;
};

// Made and filled by the thread that asks, read by the thread that fetches, waited for by any. `outputs[t]` is table
// t's buffer.
struct Job {
  Job() = default;
  Job(Gathered gathered, std::vector<RowsOut> outputs)
      : misses(std::move(gathered.misses)), outputs(std::move(outputs)), fault(gathered.fault) {}
  ~Job() { let_go(); }
  Job(const Job&) = delete;
  Job& operator=(const Job&) = delete;

  std::vector<Miss> misses;
  std::vector<RowsOut> outputs;
  Fault fault;                                      // of the thread that fetches until the job is done
  std::chrono::steady_clock::time_point started{};  // of a job that is timed: when it was asked for

  // Takes over what keeps the outputs alive. Comes before the first read.
  void hold(Held* held) { held_ = held; }

  // Brings equal requests together, so that each is read once. Gives up, in any order, once the job is cancelled.
  void sort() {
    constexpr uint32_t kLook = 1 << 14;  // comparisons between two looks, well below a millisecond
    uint32_t left = kLook;
    struct Stopped {};
    try {
      std::sort(misses.begin(), misses.end(), [&](const Miss& a, const Miss& b) {
        if (--left == 0) {
          if (cancelled()) throw Stopped{};
          left = kLook;
        }
        return std::tie(a.table, a.order, a.key) < std::tie(b.table, b.order, b.key);
      });
    } catch (const Stopped&) {
    }
  }

  // Nothing is written to the outputs once this has returned; reads that are under way go to staging alone. The job
  // still ends by itself. Waits at most for what is being copied.
  void cancel() {
    if (is_done()) return;
    {
      const std::lock_guard<std::mutex> lock(writing);
      cancelled_.store(true, std::memory_order_relaxed);
    }
    let_go();
  }
  bool cancelled() const { return cancelled_.load(std::memory_order_relaxed); }

  // Lets go of what keeps the outputs alive: nothing is written any more. Any threads, any number of times.
  void let_go() noexcept {
    Held* held = held_.exchange(nullptr);
    if (held != nullptr) held->release();
  }

  // Says that nothing is written any more, and that `fault` is how it ended.
  void finish() {
    let_go();
    {
      const std::lock_guard<std::mutex> lock(mutex);
      done_.store(true, std::memory_order_release);
    }
    changed.notify_all();
  }

  // Whether a worker has it in its hands, so that it does not wait for a page reader.
  bool begun() const { return begun_.load(std::memory_order_relaxed); }
  void note_begun() { begun_.store(true, std::memory_order_relaxed); }

  bool is_done() const { return done_.load(std::memory_order_acquire); }

  // Returns whether the job was done within `seconds`. A job that is done takes no lock: in a forked child, another
  // thread of the parent may have held it.
  bool wait(double seconds) {
    if (is_done()) return true;
    std::unique_lock<std::mutex> lock(mutex);
    return changed.wait_for(lock, std::chrono::duration<double>(seconds), [this] { return is_done(); });
  }

  // In a forked child: the threads that carried it, and what they locked, are the parent's.
  void end_after_fork() {
    fault = {FaultKind::kForked, 0, 0, 0};
    new (&writing) std::mutex;
    new (&mutex) std::mutex;
    new (&changed) std::condition_variable;
    finish();
  }

  std::mutex writing;  // held while outputs are written to
  std::mutex mutex;    // of `changed`
  std::condition_variable changed;

  // Of the engine that carries it, guarded by its runtime's mutex: who waits for a page reader; all that are under way,
  // which own themselves.
  Job* next_in_line = nullptr;
  Job *before = nullptr, *after = nullptr;
  std::shared_ptr<Job> self;

 private:
  std::atomic<Held*> held_{nullptr};
  std::atomic<bool> begun_{false}, cancelled_{false}, done_{false};
};

}  // namespace tierstore
