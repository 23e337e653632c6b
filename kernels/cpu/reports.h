// Reports: what an attached client reports to the daemon of its lookups, through a ring in memory that both map.
//
// Input: reports, from any number of the client's threads. Output: the same, some missing, to one reader in the daemon.
// The client may write anything into its block, so the reader trusts nothing of it: garbage costs the client
// its own reports and the daemon bounded work. Nobody ever waits: a report that finds the ring full is dropped and
// counted.
//
//   byte 0    active[0]   u64, on a line of its own: epochs.h
//        64   active[1]   u64
//        128  written     u64  positions reserved so far, by the client
//        192  read        u64  positions that may be used again, by the daemon
//        256  dropped     u64  reports that found no room, by the client
//        320  magic       u64  written by `init_client_block`
//        384  pinned[0]   u64, on a line of its own: as active, of a device's kernels
//        448  pinned[1]   u64
//        4096 8192 records: i64 key | u16 table | u8 order | u8 source and weight | u32 seal
//
// A record's second word is stored at once and last. Its seal is the lap of the ring, from 1 on, mixed with the key: so
// a record that is half written, of another lap, or one word of one writer and one of another who came a whole lap
// late, does not pass for one.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace tierstore {

constexpr size_t kNumRingReports = 8192;
constexpr size_t kClientHeaderBytes = 4096;
constexpr uint64_t kClientBlockMagic = 0x0001746C635F7374ull;  // "st_clt", version 1

// One access to a key, or 2^n accesses of which this one stands for all.
struct Report {
  int64_t key;
  uint16_t table;
  uint8_t order;              // its index
  uint8_t source_and_weight;  // low 3 bits: Source of engine.h; high 5: n

  uint64_t weight() const { return uint64_t{1} << (source_and_weight >> 3); }
};
static_assert(sizeof(Report) == 16, "kernels.REPORT");

struct alignas(64) CountLine {
  std::atomic<uint64_t> value;
};

struct alignas(64) ClientBlock {
  CountLine active[2];
  CountLine written, read, dropped;
  alignas(64) std::atomic<uint64_t> magic;
  CountLine pinned[2];
  uint8_t unused[kClientHeaderBytes - 512];
  struct {
    std::atomic<int64_t> key;
    std::atomic<uint64_t> rest;  // table, order, source and weight, seal, from the lowest bits on
  } records[kNumRingReports];

  static ClientBlock* of(uint8_t* block) { return reinterpret_cast<ClientBlock*>(block); }
};
constexpr size_t kClientBlockBytes = sizeof(ClientBlock);
static_assert(kClientBlockBytes == kClientHeaderBytes + 16 * kNumRingReports && offsetof(ClientBlock, dropped) == 256 &&
                  offsetof(ClientBlock, magic) == 320 && offsetof(ClientBlock, pinned) == 384 &&
                  offsetof(ClientBlock, records) == kClientHeaderBytes,
              "as drawn above");
static_assert(std::atomic<uint64_t>::is_always_lock_free, "a lock would lie in one process only");

// Makes a block, at a multiple of 64, one without reports. Nobody may use it meanwhile.
void init_client_block(uint8_t* block);

// The client's end. Any number of threads, of any number of processes, may add at once.
class ReportWriter {
 public:
  // `block` has been through `init_client_block`.
  explicit ReportWriter(uint8_t* block) : block_(ClientBlock::of(block)) {}

  // Writes reports, as many as there is room for, in one reservation; the others are dropped. Never waits, not for a
  // reader that is dead either.
  void add(const Report* reports, size_t num_reports);

 private:
  ClientBlock* block_;
};

// The daemon's end. One thread at a time.
class ReportReader {
 public:
  // `block` has been through `init_client_block`, and no other reader has read of it.
  explicit ReportReader(uint8_t* block) : block_(ClientBlock::of(block)) {}

  // Copies the next reports, at most `max`, and returns how many. A record that is reserved and not yet written ends
  // the call; if it still is not at the next call, its writer is taken for dead, and it is passed by.
  size_t take(Report* out, size_t max);

  // Positions passed by: never written, written too late, or not what a writer leaves.
  uint64_t lost() const { return lost_; }
  // What the client says that it dropped.
  uint64_t dropped() const { return block_->dropped.value.load(std::memory_order_relaxed); }

 private:
  ClientBlock* block_;
  uint64_t position_ = 0;  // of the next record; `read` in the block is for writers, and is never read here
  uint64_t overdue_ = 0;   // positions from there on that were reserved at the last call already
  uint64_t lost_ = 0;
};

}  // namespace tierstore
