// The lookup path of an open store: hits copied by the caller's thread, misses carried by lanes.
//
// A lookup that misses takes a lane and drives it itself: no hand-over, no wake-up. A submit takes a lane, starts its first
// reads and hands it to a worker thread, which finishes the job whether anybody waits or not. Lanes, and so staging, reads in
// flight and threads, are bounded; who finds none free waits in line. Any number of threads may call at once.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "epochs.h"
#include "faults.h"
#include "job.h"
#include "lane.h"
#include "reports.h"
#include "table.h"

namespace tierstore {

struct EngineShape {
  ReadMode mode;
  bool use_process_madvise;
  size_t num_lanes;
  size_t pread_threads;
  size_t jobs_max;  // submitted and not done; beyond it, submit waits
  double wait_s;    // the longest that anything here waits for the disk or for a lane
  LaneShape lane;
  // Of a daemon's shared memory; null in a store of its own process.
  const EpochLine* epochs = nullptr;
  uint64_t version = 0;
  uint8_t* client_block = nullptr;
  bool reports = false;  // whether lookups are reported in it
};

// Counts of one table: by order, keys found in memory, those of them in the static set, and keys fetched.
struct TableCounters {
  explicit TableCounters(size_t num_orders) : hits(num_orders), static_hits(num_orders), misses(num_orders) {}
  std::vector<std::atomic<uint64_t>> hits, static_hits, misses;
};

// rows: asked for one by one, by their ids; rows_missed: those of them that no memory held.
struct Counters {
  std::atomic<uint64_t> batches{0}, zero_miss_batches{0}, sentinels{0}, rows{0}, rows_missed{0};
};

// How long lookups took, from the call until the rows were there, whether anybody waited or not: counts by powers of two of a
// microsecond, and the sum. One lookup in kShare is timed: two looks at the clock would be a noticeable part of the shortest.
struct Latency {
  using Clock = std::chrono::steady_clock;
  static constexpr size_t kBounds = 21;  // 1 us to 1.05 s; what took longer comes last
  static constexpr unsigned kShareLog2 = 3;

  // Returns when a lookup begins, or the clock's zero: it is not timed. Chance decides, because the layers of a model take turns,
  // and every eighth lookup would always be the same layer's.
  static Clock::time_point begin() {
    // The generator of MMIX (Knuth, TAOCP 2, 3.3.4); its high bits are good enough for chance.
    thread_local uint64_t state = reinterpret_cast<uintptr_t>(&state);
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return state >> (64 - kShareLog2) == 0 ? Clock::now() : Clock::time_point{};
  }

  // Counts a lookup that ends now, if it is timed.
  void end(Clock::time_point started) {
    if (started != Clock::time_point{}) add(static_cast<uint64_t>((Clock::now() - started) / std::chrono::nanoseconds(1)));
  }

  void add(uint64_t took_ns) {
    size_t bucket = 0;
    while (bucket < kBounds && took_ns > uint64_t{1000} << bucket) ++bucket;
    counts[bucket].fetch_add(1, std::memory_order_relaxed);
    sum_ns.fetch_add(took_ns, std::memory_order_relaxed);
  }

  std::atomic<uint64_t> counts[kBounds + 1]{};
  std::atomic<uint64_t> sum_ns{0};
};

class Engine {
 public:
  Engine(std::vector<Table> tables, const EngineShape& shape);
  // Closes; where reads do not end, what they write to is leaked.
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  std::vector<Table>& tables() { return tables_; }

  // Every use of the engine lives as long as one of these, which is false once the engine is closed. It sees one epoch.
  class Use {
   public:
    explicit Use(Engine& engine) : engine_(engine), view_(engine.gate_->enter()), open_(!engine.closed_.load()) {}
    ~Use() { engine_.gate_->leave(view_); }  // and nothing more: who closes the engine may free it from here on
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;
    explicit operator bool() const { return open_; }
    const EpochView& view() const { return view_; }

   private:
    Engine& engine_;
    const EpochView view_;
    const bool open_;
  };

  // How many lanes there are: fewer than asked for where memory or descriptors did not reach.
  size_t num_lanes() const;

  // Copies what memory holds of a table's pairs, entry i to out + i * entry_bytes, and appends the rest to job.misses.
  void gather(const EpochView& view, size_t table, const PairList& list, uint8_t* out, Job& job);
  // The same of keys of whole tokens, [num_tokens, O].
  void gather(const EpochView& view, size_t table, const int64_t* keys, size_t num_tokens, uint8_t* out, Job& job) {
    gather(view, table, {keys, num_tokens * tables_[table].num_orders}, out, job);
  }

  // Reads rows (kRowUnit; id -1 for zeros) or pages (kPageUnit) by number into `out`, past the cache. Blocks on the disk.
  // of_tokens: the ids are those of whole tokens, [N, O * H], and are counted as their keys; others are counted as rows.
  void read(size_t table, const int64_t* ids, size_t num_ids, uint8_t* out, uint8_t unit, bool of_tokens, Job& job);

  // Writes the Source of each of a table's keys, [num_tokens, O]. Counts nothing.
  void locate(const EpochView& view, size_t table, const int64_t* keys, size_t num_tokens, uint8_t* sources);

  void count_batch(const Job& job);

  // Fetches a job's misses on the caller's thread. Blocks on the disk.
  void fetch(Job& job);
  // The same by a worker: the first reads are in flight when it returns, unless every lane is busy.
  void submit(const std::shared_ptr<Job>& job);

  // Waits at most `seconds` for uses and jobs to end, then stops the workers. Returns whether all ended. Any threads may call it.
  bool close(double seconds);

  // Around a fork, in this order; locks are held between the two. Attached to a daemon, the child's engine is closed: the block
  // that it would count and report in is the parent's.
  void before_fork();
  void after_fork(bool in_child);

  Counters counters;
  Latency latency;
  ReadCounters read_counters;
  FaultPlan faults;
  std::vector<TableCounters> table_counters;

 private:
  struct Runtime;

  void count_rows(size_t table, const int64_t* ids, size_t num_ids, bool of_tokens);

  Lane* acquire_lane(bool wait);
  Lane* take_lane();
  bool make_lane();
  void release_lane(Lane* lane);
  void drive(Lane& lane, Job& job);
  void work();

  std::vector<Table> tables_;
  const EngineShape shape_;
  std::unique_ptr<Runtime> runtime_;
  std::unique_ptr<EpochGate> gate_;
  std::unique_ptr<ReportWriter> reports_;  // null: lookups are not reported
  std::atomic<bool> closed_{false};
};

}  // namespace tierstore
