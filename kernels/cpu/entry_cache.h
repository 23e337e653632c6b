// The recency cache of the dram tier: entries by (order, key), in sets of 8 with one version a set.
//
// It lies in one flat block of memory that holds no pointers, so that other processes can map and read it:
//
//   num_sets sets of 128 bytes | num_sets histories of 128 bytes | num_sets * 8 entries of entry_stride bytes
//
// Readers take no lock: they copy, then compare the set's version (a sequence lock: Boehm, "Can seqlocks get along with
// programming language memory models?", 2012). Odd or changed is a miss, never a spin. One writer at a time.
//
// Admission: two ways of a set are its window, where every new entry starts. The oldest of the window then takes the
// place of the least used other entry only if it was used as often, so that first-seen keys and one long prefill wash
// out nothing that is counted (Einziger, Friedman, Manes: "TinyLFU", 2017). What a key was used before it last left is
// remembered by the set's history of 32 fingerprints (ghost entries, as in Johnson, Shasha: "2Q", 1994). Uses saturate
// at 15 and are halved as the cache ages.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>

namespace tierstore {

constexpr size_t kWays = 8;
constexpr size_t kWindowWays = 2;
constexpr size_t kGhosts = 32;
constexpr uint8_t kCountMax = 15;
constexpr unsigned kTagShift = 4;  // what distinguishes equal orders of two versions of a table lies above the order
constexpr uint64_t kAgeAccessesPerEntry = 10;  // counts are halved after so many accesses for each entry that fits

struct alignas(64) CacheSet {
  std::atomic<int64_t> keys[kWays];  // -1: empty
  std::atomic<uint64_t> version;     // odd while a writer is at work, or died there
  std::atomic<uint8_t> orders[kWays];
  std::atomic<uint8_t> counts[kWays];  // uses; readers raise them, which no correctness depends on
  uint8_t arrivals[kWays];             // the set's clock when each entry came; from here on the writer's alone
  uint8_t clock;
  uint8_t window;  // bit w: way w is in the window
  uint8_t age;     // of the counts
  uint8_t unused[29];
};
static_assert(sizeof(CacheSet) == 128, "two cache lines: keys, then what a probe that found its key needs");

// Keys that left the set lately, the writer's alone. A fingerprint of 0: the slot is empty.
struct alignas(64) CacheHistory {
  uint16_t fingerprints[kGhosts];
  uint8_t uses[kGhosts];
  uint8_t next;  // the oldest, which gives way first
  uint8_t unused[31];
};
static_assert(sizeof(CacheHistory) == 128, "two cache lines");

// What a probe found out about one pair; `way` below 0 says miss.
struct Probe {
  const CacheSet* set = nullptr;
  const uint8_t* entry = nullptr;
  int way = -1;
};

class EntryCache {
 public:
  // `block` has `block_bytes(num_sets, entry_bytes)` bytes, at a multiple of 64, and outlives the cache. Where it is
  // not writable, being another process's, readers count no uses and nothing may be offered.
  EntryCache(uint8_t* block, size_t num_sets, size_t entry_bytes, bool writable = true);

  static size_t entry_stride(size_t entry_bytes) { return (entry_bytes + 7) / 8 * 8; }
  static size_t block_bytes(size_t num_sets, size_t entry_bytes) {
    return num_sets * (sizeof(CacheSet) + sizeof(CacheHistory) + kWays * entry_stride(entry_bytes));
  }

  // Empties every set. No reader may be at work.
  void clear();

  bool writable() const { return writable_; }
  size_t num_sets() const { return num_sets_; }
  size_t entry_bytes() const { return entry_bytes_; }

  // A reader's three steps, apart so that many pairs overlap their waits for memory: where is the set, which way holds
  // the pair, copy its entry. `copy` returns whether the entry was whole and still the pair's; else `to` is undefined.
  const CacheSet* find_set(uint8_t order, int64_t key) const;
  Probe probe(const CacheSet* set, uint8_t order, int64_t key) const;
  // `next` and `streamed` as for `racing_copy`.
  bool copy(const Probe& probe, uint8_t order, int64_t key, uint8_t* to, const uint8_t* next = nullptr,
            bool streamed = false) const;

  // Counts lookups, hits and misses alike: the clock of ageing.
  void count_accesses(uint64_t num_accesses) { accesses_.fetch_add(num_accesses, std::memory_order_relaxed); }

  // The writer: puts an entry in, perhaps in another's place. The caller holds `writer()`.
  void offer(uint8_t order, int64_t key, const uint8_t* entry);
  // The writer: counts a use that a reader of a read-only mapping could not count. The caller holds `writer()`.
  void touch(uint8_t order, int64_t key);
  // The writer: takes out all entries of one tag (`Table::tag`). Readers may be at work. The caller holds `writer()`.
  void drop_tag(uint8_t tag);
  std::mutex& writer() { return writer_; }

 private:
  size_t choose_way(CacheSet& set, CacheHistory& history);
  void catch_up(CacheSet& set, CacheHistory& history);

  CacheSet* sets_;
  CacheHistory* histories_;
  uint8_t* entries_;
  size_t num_sets_;
  size_t entry_bytes_;
  size_t stride_;
  bool writable_;
  std::atomic<uint64_t> accesses_{0};
  uint64_t next_ageing_;
  uint8_t age_ = 0;
  std::mutex writer_;
};

}  // namespace tierstore
