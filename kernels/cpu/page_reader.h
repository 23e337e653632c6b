// A page reader: one page queue with its staging, which carries one job at a time from misses to rows in place.
//
// A job goes in read batches of as many requests as the assembly buffer holds. The pages of a read batch are sorted and
// each is read once, and a key that has a record in the placement file is one read of that instead of its pages; as
// they arrive, they are checked, and their rows put together in the assembly buffer; a finished read batch is copied to
// the outputs and offered to the caches. Two read batches overlap, so that the queue stays full from one to the next. A
// page reader belongs to one thread at a time.
//
// If the cache wants no copy of what a miss asks for (a row by its id; a cache that this process may only read), rows
// go from their page straight to the outputs; those of planes are put together first.
//
// Reads write to staging alone. The job's outputs are written to under its `writing` lock, by the thread that runs the
// page reader, and never again once the job is cancelled or failed. No call fails: what goes wrong is the job's fault.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "faults.h"
#include "job.h"
#include "page_queue.h"
#include "table.h"

namespace tierstore {

struct PageReaderShape {
  size_t depth;           // pages in flight at most
  size_t page_bytes;      // of the largest page, or of the largest read of a placed entry
  size_t assembly_bytes;  // of each of the two read batches

  size_t staging_bytes() const { return depth * page_bytes + 2 * assembly_bytes; }
};

// Counters of what was read: pages, placed entries, bytes of both, and those of the bytes that rows by id
// took. Any thread may add. A page reader adds once in a `run`: counters that several write to with each page would
// cost each of them a wait for the others' cores.
struct alignas(64) ReadCounters {
  std::atomic<uint64_t> pages{0}, entries{0}, bytes{0}, row_bytes{0};
};

class PageReader {
 public:
  PageReader(const std::vector<Table>& tables, const PageReaderShape& shape, std::unique_ptr<PageQueue> queue,
             FaultPlan& faults, ReadCounters& counters);
  // Where reads are still in flight, leaks the staging that they write to.
  ~PageReader();
  PageReader(const PageReader&) = delete;
  PageReader& operator=(const PageReader&) = delete;

  // Takes a sorted job on, without blocking on the disk. Its first reads begin with `send`, or with `run`.
  void begin(Job& job) noexcept;
  void send() noexcept { queue_->send(); }

  // Goes on until the job is done or failed and nothing of it is in flight (true), or for about `slice_ms` (false). A
  // failed job's `fault` says what was wrong.
  bool run(int slice_ms) noexcept;

  // How long no page has arrived, while a job runs.
  std::chrono::steady_clock::duration stalled() const { return std::chrono::steady_clock::now() - last_arrival_; }

  // Lets go of a job whose reads do not end; the page reader is busy until they do.
  void abandon(const Fault& fault);

  bool is_registered() const { return queue_->is_registered(); }

  // For a page reader that is left as it is, with a read that hangs. Any thread may call.
  void let_files_go() noexcept { queue_->let_files_go(); }

  Job* job() const { return job_; }
  bool is_abandoned() const { return job_ == &abandoned_; }

  // In a forked child: forgets the staging, which the child does not have, and what is in flight, which is the
  // parent's.
  void abandon_after_fork();

 private:
  // One row of a page, of the table or of a version's file; or a plane's part of a row, whose `page` is its first unit;
  // or a placed entry. See kPlacedRead and its neighbours.
  struct RowWant {
    uint64_t page;
    uint32_t table;
    uint32_t byte;  // within the page, or from the start of the first unit
    uint32_t num_bytes;
    uint32_t miss;      // of the read batch's; others that ask for the same follow it
    uint32_t row;       // which row of the entry
    uint8_t num_pages;  // that the row lies in, neighbours; above 1 in blocks only
    uint8_t* to;        // in the assembly buffer; null: to the outputs
  };
  struct ReadBatch {
    size_t miss_start = 0, miss_end = 0;  // of the job's misses
    std::vector<RowWant> wants;           // sorted by table and page
    std::vector<size_t> group_starts;     // in `wants`, one a page, and the end
    size_t groups_started = 0, groups_left = 0;
    uint8_t* assembly = nullptr;
  };
  // An entry that its table's cache may take.
  struct Offer {
    const Miss* miss;
    const uint8_t* entry;
  };
  struct Flight {
    ReadBatch* batch;
    size_t group;
  };

  size_t num_awaited() const;
  void complete_some();
  void fill_batches();
  void plan_batch(ReadBatch& batch);
  // Bytes of the entry, or the row, that a miss asks for.
  size_t request_bytes(const Miss& miss) const {
    const Table& table = tables_[miss.table];
    return miss.order == kRowRequest ? table.row_bytes : table.entry_bytes();
  }
  // Whether the cache may take what a miss asks for.
  bool is_cached(const Miss& miss) const {
    const EntryCache* cache = tables_[miss.table].cache.get();
    return miss.order != kRowRequest && cache != nullptr && cache->writable();
  }
  bool is_assembled(const Miss& miss) const { return is_cached(miss) || !tables_[miss.table].planes.empty(); }
  void want_rows(ReadBatch& batch, const Miss& miss, uint8_t* to);
  void want_elsewhere(ReadBatch& batch, uint64_t row_id, RowWant want);
  void want_planes(ReadBatch& batch, uint64_t row_id, RowWant want);
  void group_wants(ReadBatch& batch);
  PageRead read_of(const ReadBatch& batch, size_t group, uint32_t slot);
  void start_reads();
  void complete(const PageDone& done);
  Fault complete_page(const ReadBatch& batch, size_t group, PageDone done);
  PlaneSource::Range range_of(const ReadBatch& batch, size_t group) const;
  size_t page_bytes_of(const ReadBatch& batch, size_t group) const;
  Fault check_page(const Table& table, uint32_t index, uint64_t page, size_t num_bytes, const uint8_t* bytes) const;
  Fault complete_placed(const ReadBatch& batch, size_t group, PageDone done);
  void ask_for_next() const;
  void finish_batch(ReadBatch& batch);
  void offer_some();
  void put_all(const ReadBatch& batch, const RowWant& want, const uint8_t* from);
  void put(const Miss& miss, const uint8_t* from);
  void put_row(const Miss& miss, size_t row, const uint8_t* from);
  void note_counts();
  void fail(const Fault& fault);
  bool active(const ReadBatch& batch) const { return batch.groups_left > 0; }

  const std::vector<Table>& tables_;
  const PageReaderShape shape_;
  std::unique_ptr<PageQueue> queue_;
  FaultPlan& faults_;
  ReadCounters& counters_;
  uint8_t* staging_;
  ReadBatch batches_[2];
  std::vector<Flight> flights_;  // by slot
  std::vector<uint32_t> free_slots_;
  std::vector<PageRead> reads_;  // scratch
  std::vector<PageDone> done_;   // arrived; those from done_next_ on are not completed
  size_t done_next_ = 0;
  static constexpr size_t kOfferedAtOnce = 16;
  Offer offers_[kOfferedAtOnce];  // of one table
  size_t num_offers_ = 0;
  struct {
    uint64_t pages = 0, entries = 0, bytes = 0, row_bytes = 0;
  } counted_;  // not yet in counters_
  Job* job_ = nullptr;
  Job abandoned_;
  size_t next_miss_ = 0;
  size_t in_flight_ = 0;
  std::chrono::steady_clock::time_point last_arrival_{};

 public:
  PageReader* next_in_line = nullptr;  // of the engine: page readers that wait for a worker
};

}  // namespace tierstore
