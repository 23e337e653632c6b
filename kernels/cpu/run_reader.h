// Training records by (run, place): read from open runs, each checked, many reads under way.
//
// A call sorts what it is asked for. Records that lie within some KiB of each other become one read, since a disk takes
// hardly longer for 12 KiB than for 4. Each record is checked as it arrives: its checksum, its run's number, and that
// it is of the row that was asked for. formats/run.py says how a run looks.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "entry_index.h"
#include "faults.h"
#include "page_queue.h"

namespace tierstore {

// An open run; closes its descriptors when nobody reads from it any more.
struct RunFile {
  ShardFile file;
  uint32_t number = 0;
  uint64_t byte_start = 0;  // of the first record
  uint32_t num_records = 0;

  RunFile() = default;
  ~RunFile();
  RunFile(const RunFile&) = delete;
  RunFile& operator=(const RunFile&) = delete;
};

struct RunReaderShape {
  RecordShape record;  // record_bytes: with the seal
  size_t depth;        // reads under way for one call
  size_t read_bytes;   // the largest read: at least what one record takes
  size_t num_calls;    // that read at the same time; others wait
};

enum class RunFaultKind { kNone, kNoRun, kDisk, kDamaged, kOtherRow, kTimeout, kInterrupted };

// What went wrong with one record. detail: of kDisk an errno, or kCutShort.
struct RunFault {
  RunFaultKind kind = RunFaultKind::kNone;
  uint16_t run = 0;
  uint32_t place = 0;
  int64_t row_id = 0;
  int detail = 0;
};

class RunReader {
 public:
  RunReader(const RunReaderShape& shape, ReadMode mode);
  ~RunReader();
  RunReader(const RunReader&) = delete;
  RunReader& operator=(const RunReader&) = delete;

  // Gives an open run the ordinal that it is asked for by from now on.
  void add(uint16_t ordinal, std::shared_ptr<const RunFile> run);
  // Forgets a run; calls under way go on with it.
  void remove(uint16_t ordinal);

  // Reads records, without their seals, to out + i * out_stride. Blocks. `interrupted` is asked every 50 ms or so, and
  // ends the call if it says so. Throws std::bad_alloc before the first read.
  RunFault read(const int64_t* row_ids, const uint16_t* runs, const uint32_t* places, size_t count, uint8_t* out,
                size_t out_stride, const std::function<bool()>& interrupted);

  size_t num_bytes() const { return shape_.num_calls * staging_bytes(); }
  FaultPlan& faults() { return faults_; }
  uint64_t num_reads() const { return num_reads_.load(std::memory_order_relaxed); }
  uint64_t num_bytes_read() const { return num_bytes_read_.load(std::memory_order_relaxed); }

 private:
  using Files = std::vector<std::shared_ptr<const RunFile>>;
  // What one call reads with.
  struct Means {
    std::unique_ptr<PageQueue> queue;
    uint8_t* staging = nullptr;
    std::vector<uint32_t> free_slots;
  };
  struct Wanted {
    uint64_t where;  // run, then place
    uint32_t index;  // in the call's arrays
  };
  // Records begin .. end - 1 of the sorted ones, which one read brings.
  struct Group {
    size_t begin, end;
    uint64_t byte_start;
    uint32_t num_bytes;
  };
  class Call;

  size_t staging_bytes() const { return shape_.depth * shape_.read_bytes; }
  Means* take_means();
  void give_back(Means* means);
  void free_staging(Means& means) const;

  const RunReaderShape shape_;
  const int owner_;  // the process that made it
  std::unique_ptr<PreadPool> pool_;
  FaultPlan faults_;
  std::atomic<uint64_t> num_reads_{0}, num_bytes_read_{0};
  std::mutex mutex_;  // guards what follows
  std::condition_variable given_back_;
  std::shared_ptr<const Files> files_;  // by ordinal; replaced, never changed
  std::vector<std::unique_ptr<Means>> means_;
  std::vector<Means*> free_means_;
};

}  // namespace tierstore
