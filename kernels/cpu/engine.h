// The lookup path of an open store: hits copied by the caller's thread, misses carried by page readers.
//
// A lookup that misses takes a page reader and drives it itself: no hand-over, no wake-up. If it takes longer than a
// slice, a worker thread goes on with it, so that the caller can look after signals without a page reader in its hand.
// A submit takes a page reader, starts its first reads and hands it to a worker, which finishes the job whether anybody
// waits or not. If the system gives no thread, callers carry their jobs themselves. Page readers, and so staging, reads
// in flight and threads, are bounded; if none is free, the caller queues. Any number of threads may call at once.
//
//   job:  gathered -> [waits for room] -> under way: [in line for a page reader] -> with a page reader -> done
//                                                     cancelled at any time: nothing more is written, and it ends by
//                                                     itself
//
// What a job needs on its way it has before it starts: its buffers are held by it, and lists are threaded through jobs
// and page readers. So nothing between the first read and the last can fail for want of memory, but for what the job's
// fault then says.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "crew.h"
#include "epochs.h"
#include "faults.h"
#include "gather.h"
#include "job.h"
#include "page_reader.h"
#include "reports.h"
#include "table.h"

namespace tierstore {

constexpr size_t kPartsMin = 4;  // of a request for which the crew is woken
constexpr int kSliceMs = 50;     // how long anything here waits or works before it looks whether it should end

struct EngineShape {
  ReadMode mode;
  bool use_process_madvise;
  size_t num_readers;
  size_t num_threads;  // that copy what memory holds of one large lookup, the caller's included
  size_t part_bytes;   // of output: what each of them copies at a time
  size_t pread_threads;
  size_t jobs_max;  // submitted and not done; beyond it, submit waits
  double wait_s;    // the longest that anything here waits for the disk or for a page reader
  PageReaderShape reader;
  // Of a daemon's shared memory; null in a store of its own process.
  const EpochLine* epochs = nullptr;
  uint64_t version = 0;
  uint8_t* client_block = nullptr;
  bool reports = false;        // whether lookups are reported in it
  std::string served_by = {};  // of kServed: the Unix socket of who serves the shards,
  double served_wait_s = 0;    // and how long it may take to answer
};

// Counts of one table: by order, keys found in memory, those of them in the static set, and keys fetched.
struct TableCounters {
  explicit TableCounters(size_t num_orders) : hits(num_orders), static_hits(num_orders), misses(num_orders) {}
  std::vector<std::atomic<uint64_t>> hits, static_hits, misses;
};

// rows: asked for one by one, by their ids; rows_missed: those of them that no memory held.
struct alignas(64) Counters {
  std::atomic<uint64_t> batches{0}, zero_miss_batches{0}, sentinels{0}, rows{0}, rows_missed{0};
};

// How long lookups took, from the call until the rows were there, whether anybody waited or not: counts by powers of
// two of a microsecond, and the sum. One lookup in kShare is timed: two looks at the clock would be a noticeable part
// of the shortest.
struct alignas(64) Latency {
  using Clock = std::chrono::steady_clock;
  static constexpr size_t kBounds = 21;  // 1 us to 1.05 s; what took longer comes last
  static constexpr uint64_t bound_ns(size_t bucket) { return uint64_t{1000} << bucket; }
  static constexpr unsigned kShareLog2 = 3;

  // Returns when a lookup begins, or the clock's zero: it is not timed. Chance decides, because the layers of a model
  // take turns, and every eighth lookup would always be the same layer's.
  static Clock::time_point begin() {
    // The generator of MMIX (Knuth, TAOCP 2, 3.3.4); its high bits are good enough for chance.
    thread_local uint64_t state = reinterpret_cast<uintptr_t>(&state);
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return state >> (64 - kShareLog2) == 0 ? Clock::now() : Clock::time_point{};
  }

  // Counts a lookup that ends now, if it is timed.
  void end(Clock::time_point started) {
    if (started != Clock::time_point{})
      add(static_cast<uint64_t>((Clock::now() - started) / std::chrono::nanoseconds(1)));
  }

  void add(uint64_t took_ns) {
    size_t bucket = 0;
    while (bucket < kBounds && took_ns > bound_ns(bucket)) ++bucket;
    counts[bucket].fetch_add(1, std::memory_order_relaxed);
    sum_ns.fetch_add(took_ns, std::memory_order_relaxed);
  }

  std::atomic<uint64_t> counts[kBounds + 1]{};
  std::atomic<uint64_t> sum_ns{0};
};

class Engine {
 public:
  Engine(std::vector<Table> tables, const EngineShape& shape);
  // Closes. Reads must end by then, as a `close` that returned true says: else their threads go on with what is gone.
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  std::vector<Table>& tables() { return tables_; }
  bool is_closed() const { return closed_.load(); }

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

  // A job on its caller's thread, slice by slice. Whatever ends this, its page reader is given back, and the job, if it
  // is not done and no worker has it, is written to no more.
  class Carrier {
   public:
    Carrier(Engine& engine, const std::shared_ptr<Job>& job) : engine_(engine), job_(job) {}
    ~Carrier();
    Carrier(const Carrier&) = delete;
    Carrier& operator=(const Carrier&) = delete;

    enum class State { kDone, kHandedOn, kUnderWay };
    // Goes on for about a slice. kDone: the job has its rows, or its fault. kHandedOn: a worker has it, and it will be
    // `done` one day. Blocks on the disk.
    State run();
    // From the next `run` on, a worker may take the job: it holds what it writes to.
    void let_hand_on() { hands_on_ = true; }

   private:
    Engine& engine_;
    const std::shared_ptr<Job> job_;
    bool hands_on_ = false;
    bool begun_ = false;
    PageReader* reader_ = nullptr;
    std::chrono::steady_clock::time_point started_{};
  };

  // How many page readers there are: fewer than asked for if memory or descriptors do not reach. How many of them are
  // free.
  size_t num_readers() const;
  size_t num_free_readers() const;
  // How many of them have files and memory registered with the kernel.
  size_t num_registered_readers() const;

  // Threads that share large requests with their callers; and of how much output each of them takes a part.
  Crew& crew();
  size_t part_bytes() const { return shape_.part_bytes; }

  // A request that is a part of a larger one, whose output has so many bytes: the crew shares that one, and not this.
  struct PartOf {
    size_t whole_bytes;
  };
  // Copies what memory holds of a table's pairs, pair i to entry list.first + i of out, and appends the rest to the
  // misses. Returns false, with `out` undefined and nothing counted, if a key or a pair is not one of the table's.
  bool gather(const EpochView& view, size_t table, const PairList& list, const Output& out, Gathered& gathered,
              const std::optional<PartOf>& part_of = {});

  // Appends rows by their ids, -1 for zeros, to what must be read past the cache; rows of a resident table, and zeros,
  // are copied. of_tokens: the ids are those of whole tokens, [N, O * H], and of a resident table are counted as keys.
  // Returns as `gather` does; ids.first counts rows.
  bool gather_rows(size_t table, const PairList& ids, uint8_t* out, bool of_tokens, Gathered& gathered);

  // Writes the Source of each of a table's keys, [num_tokens, O]. Counts nothing.
  void locate(const EpochView& view, size_t table, const int64_t* keys, size_t num_tokens, uint8_t* sources);

  void count_batch(const Gathered& gathered);

  // Returns a job that fetches what was gathered into outputs: (table, its buffer), ...
  std::shared_ptr<Job> make_job(Gathered gathered, const std::vector<std::pair<size_t, RowsOut>>& outputs) const;

  // Fetches a job's misses on the caller's thread, to the end. Blocks on the disk.
  void fetch(const std::shared_ptr<Job>& job);
  // Has a worker fetch them: the first reads are in flight when it returns, unless every page reader is busy. kNoRoom:
  // jobs_max jobs are under way; kNoWorker: the system gives no thread. Nothing was done then.
  enum class Submitted { kUnderWay, kNoRoom, kNoWorker };
  Submitted submit(const std::shared_ptr<Job>& job);
  // Waits for a slice at most for another job to have room. Comes without a `Use`.
  void wait_for_room();
  // The longest that a job takes that is not stalled.
  double wait_s() const { return shape_.wait_s; }

  // Waits at most `seconds` for uses and jobs to end, then stops the workers. Returns whether all ended; call again if
  // not. Any threads may call it.
  bool close(double seconds);

  // Around a fork, in this order; locks are held between the two. Attached to a daemon, the child's engine is closed:
  // the block that it would count and report in is the parent's. `before_fork` throws, with nothing held, if there is
  // no memory.
  void before_fork();
  void after_fork(bool in_child);

  Counters counters;
  Latency latency;
  ReadCounters read_counters;
  FaultPlan faults;
  std::vector<TableCounters> table_counters;

 private:
  struct Runtime;

  Found gather_part(const EpochView& view, size_t table, const PairList& list, const Output& out, bool streamed,
                    std::vector<Miss>& misses, int64_t& bad_page);
  Found gather_shared(const EpochView& view, size_t table, const PairList& list, const Output& out, Gathered& gathered,
                      const std::optional<PartOf>& part_of);
  void number(ShardFile& file);
  void count_rows(size_t table, const PairList& ids, bool of_tokens);

  PageReader* acquire_reader(int wait_ms, Fault& why);
  PageReader* take_reader();
  bool make_reader();
  void release_reader(PageReader* reader);
  bool has_worker();
  bool hand_on(const std::shared_ptr<Job>& job, PageReader* reader);
  void give_up(PageReader* reader, const Fault& fault);
  void drain(PageReader* reader);
  void finish(Job& job);
  void work();
  void carry(PageReader* reader, Job& job);

  std::vector<Table> tables_;
  std::vector<const ShardFile*> files_;  // of all tables, each numbered
  const EngineShape shape_;
  std::unique_ptr<Runtime> runtime_;
  std::unique_ptr<Runtime> next_runtime_;  // of a forked child, while one is made
  std::unique_ptr<EpochGate> gate_;
  std::unique_ptr<ReportWriter> reports_;  // null: lookups are not reported
  std::atomic<bool> closed_{false};
};

}  // namespace tierstore
