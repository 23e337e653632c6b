// The recency cache of the dram tier: entries by (order, key), in sets of 8 with one version a set.
//
// It lies in one flat block of memory that holds no pointers, so that other processes can map and read it:
//
//   num_sets headers of 128 bytes | num_sets * 32 bytes of use counts | num_sets * 8 entries of entry_stride bytes
//
// Readers take no lock: they copy, then compare the set's version (a sequence lock: Boehm, "Can seqlocks get along with
// programming language memory models?", 2012). Odd or changed is a miss, never a spin. One writer at a time.
//
// Admission: two ways of a set are its window, where every new entry starts. The oldest of the window then takes the place of
// the least used other entry only if it was used more often, so that first-seen keys and one long prefill wash out nothing
// that is counted (Einziger, Friedman, Manes: "TinyLFU", 2017). Counts saturate at 15 and are halved as the cache ages.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>

namespace tierstore {

constexpr size_t kWays = 8;
constexpr size_t kWindowWays = 2;
constexpr size_t kSketchBytesPerSet = 32;
constexpr uint8_t kCountMax = 15;
constexpr uint64_t kAgeAccessesPerEntry = 16;  // counts are halved after so many accesses for each entry that fits

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

// What a probe found out about one pair; `way` below 0 says miss.
struct Probe {
  const CacheSet* set = nullptr;
  const uint8_t* entry = nullptr;
  int way = -1;
};

class EntryCache {
 public:
  // `block` has `block_bytes(num_sets, entry_bytes)` bytes, at a multiple of 64, and outlives the cache.
  EntryCache(uint8_t* block, size_t num_sets, size_t entry_bytes);

  static size_t entry_stride(size_t entry_bytes) { return (entry_bytes + 7) / 8 * 8; }
  static size_t block_bytes(size_t num_sets, size_t entry_bytes) {
    return num_sets * (sizeof(CacheSet) + kSketchBytesPerSet + kWays * entry_stride(entry_bytes));
  }

  // Empties every set. No reader may be at work.
  void clear();

  // A reader's three steps, apart so that many pairs overlap their waits for memory: where is the set, which way holds the
  // pair, copy its entry. `copy` returns whether the entry was whole and still the pair's; else `to` is undefined.
  const CacheSet* find_set(uint8_t order, int64_t key) const;
  Probe probe(const CacheSet* set, uint8_t order, int64_t key) const;
  // `next` and `streamed` as for `racing_copy`.
  bool copy(const Probe& probe, uint8_t order, int64_t key, uint8_t* to, const uint8_t* next = nullptr,
            bool streamed = false) const;

  // Counts lookups, hits and misses alike: the clock of ageing.
  void count_accesses(uint64_t num_accesses) { accesses_.fetch_add(num_accesses, std::memory_order_relaxed); }

  // The writer: puts an entry in, perhaps in another's place. The caller holds `writer()`.
  void offer(uint8_t order, int64_t key, const uint8_t* entry);
  std::mutex& writer() { return writer_; }

 private:
  uint64_t hash(uint8_t order, int64_t key) const;
  size_t choose_way(CacheSet& set);
  void grow_old();
  uint8_t estimate(uint64_t hash) const;
  void raise_estimate(uint64_t hash, uint8_t count);

  CacheSet* sets_;
  uint8_t* sketch_;
  uint8_t* entries_;
  size_t num_sets_;
  size_t entry_bytes_;
  size_t stride_;
  std::atomic<uint64_t> accesses_{0};
  uint64_t next_ageing_;
  uint8_t age_ = 0;
  std::mutex writer_;
};

}  // namespace tierstore
