#include "simulate.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <new>
#include <vector>

#include "entry_cache.h"
#include "racing_copy.h"

namespace tierstore {
namespace {

constexpr size_t kAhead = 16;  // accesses whose set is on its way while an earlier one is probed

// Memory of a cache without entries, on huge pages where the system allows them.
class Block {
 public:
  explicit Block(size_t num_sets) : num_bytes_(EntryCache::block_bytes(num_sets, 0)) {
    if (num_sets > SIZE_MAX / EntryCache::block_bytes(1, 0)) throw std::bad_alloc();
    void* memory = mmap(nullptr, num_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    madvise(memory, num_bytes_, MADV_HUGEPAGE);
    bytes_ = static_cast<uint8_t*>(memory);
  }
  ~Block() { munmap(bytes_, num_bytes_); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  uint8_t* bytes() const { return bytes_; }

 private:
  size_t num_bytes_;
  uint8_t* bytes_;
};

class Simulation {
 public:
  explicit Simulation(size_t num_sets)
      : block_(num_sets),
        sets_(reinterpret_cast<const CacheSet*>(block_.bytes())),
        histories_(reinterpret_cast<const CacheHistory*>(sets_ + num_sets)),
        cache_(block_.bytes(), num_sets, 0) {
    cache_.clear();
  }

  // As a lookup does: all accesses of a batch are probed, then counted, then what it missed is offered, as read: every
  // entry once, in the order of (order, key).
  void run(const Accesses& accesses, bool* hits) {
    const auto num_accesses =
        static_cast<size_t>(accesses.num_batches == 0 ? 0 : accesses.batch_ends[accesses.num_batches - 1]);
    size_t i = 0;
    for (size_t batch = 0; batch < accesses.num_batches; ++batch) {
      const size_t start = i;
      for (; i < static_cast<size_t>(accesses.batch_ends[batch]); ++i) {
        // Also those of batches to come: asking early for a set does no harm.
        if (i + kAhead < num_accesses && accesses.keys[i + kAhead] >= 0) {
          fetch_set(accesses.order_index[i + kAhead], accesses.keys[i + kAhead]);
        }
        hits[i] = accesses.keys[i] >= 0 && look_up(accesses.order_index[i], accesses.keys[i]);
      }
      cache_.count_accesses(i - start);
      for (size_t order = 0; order < kSimulatedOrdersMax; ++order) offer(static_cast<uint8_t>(order));
    }
  }

 private:
  bool look_up(uint8_t order, int64_t key) {
    uint8_t nothing;  // that an entry of no bytes is copied to
    const Probe probe = cache_.probe(cache_.find_set(order, key), order, key);
    const bool hit = probe.way >= 0 && cache_.copy(probe, order, key, &nothing);
    if (!hit) misses_[order].push_back(key);
    return hit;
  }

  void offer(uint8_t order) {
    std::vector<int64_t>& keys = misses_[order];
    if (keys.empty()) return;
    std::sort(keys.begin(), keys.end());
    keys.erase(std::unique(keys.begin(), keys.end()), keys.end());
    for (size_t i = 0; i < keys.size() + kAhead; ++i) {
      if (i < keys.size()) fetch_set_and_history(order, keys[i]);
      if (i >= kAhead) cache_.offer(order, keys[i - kAhead], block_.bytes());
    }
    keys.clear();
  }

  const CacheSet* fetch_set(uint8_t order, int64_t key) const {
    const CacheSet* set = cache_.find_set(order, key);
    fetch(reinterpret_cast<const uint8_t*>(set), sizeof(CacheSet));
    return set;
  }
  void fetch_set_and_history(uint8_t order, int64_t key) const {
    const CacheSet* set = fetch_set(order, key);
    fetch(reinterpret_cast<const uint8_t*>(histories_ + (set - sets_)), sizeof(CacheHistory));
  }

  Block block_;
  const CacheSet* sets_;
  const CacheHistory* histories_;  // where the cache keeps them: entry_cache.h
  EntryCache cache_;
  std::array<std::vector<int64_t>, kSimulatedOrdersMax> misses_;  // of the batch, by order
};

}  // namespace

void simulate_cache(const Accesses& accesses, size_t num_sets, bool* hits) { Simulation(num_sets).run(accesses, hits); }

}  // namespace tierstore
